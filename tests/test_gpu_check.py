"""The one call on a GPU, rehearsed on the CPU at tiny sizes: nothing in it may fail there."""

import json

import pytest
import torch

from common import cli
from experiments import gpu_check


def call(out, cache, *flags):
    argv = ["--out", str(out), "--device", "cpu", "--cache_dir", str(cache), *flags]
    status = gpu_check.main(cli.parse(gpu_check.get_args_parser(), argv))
    return status, json.loads((out / "gpu_check.json").read_text())


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_every_check_of_a_part_runs_on_the_cpu_and_only_cuda_is_missing(part, tiny_cache, tmp_path):
    status, report = call(tmp_path, tiny_cache, "--parts", part)
    assert report["rows"]
    for row in report["rows"]:
        assert row["status"] in ("ok", "measured", "skipped"), row
    assert {r["what"] for r in report["rows"] if r["status"] == "skipped"} <= {"host waits"}
    assert status == 0
    table = (tmp_path / "gpu_check.md").read_text()
    assert all(row["what"] in table for row in report["rows"]) and torch.__version__ in table
    assert {p.name for p in tmp_path.iterdir()} == {"gpu_check.json", "gpu_check.md"}


def test_results_that_differ_or_are_not_numbers_are_no_ok():
    assert gpu_check.compared("x", 1e-3, 1e-2)["status"] == "ok"
    assert gpu_check.compared("x", 1e-1, 1e-2)["status"] == "differs"
    assert gpu_check.compared("x", float("nan"), 1e-2)["status"] == "differs"


def test_a_check_that_raises_is_a_row_and_the_next_one_runs(monkeypatch, tmp_path):
    def broken(setting):
        yield gpu_check.row("half", 1.0)
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    checks = {"one": broken, "two": lambda setting: [gpu_check.row("whole", 2.0)]}
    monkeypatch.setitem(gpu_check.PARTS, "training", checks)
    status, report = call(tmp_path, "nowhere", "--parts", "training")
    assert [row["status"] for row in report["rows"]] == ["measured", "failed", "measured"]
    assert report["rows"][1]["note"] == "RuntimeError: CUDA error: an illegal"
    assert status == 1


def test_what_was_measured_before_a_cut_is_kept(monkeypatch, tmp_path):
    def cut(setting):
        yield gpu_check.row("kept", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_check.PARTS, "svd", {"cut": cut})
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, "nowhere", "--parts", "svd")
    (row,) = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert row["what"] == "kept" and "kept" in (tmp_path / "gpu_check.md").read_text()


def test_tokens_are_the_caches_or_said_to_be_made_up(tiny_cache):
    of_cache, made_up = (gpu_check.Setting(gpu_check.CPU, path) for path in (tiny_cache, "nowhere"))
    assert "made-up" in made_up.found_tokens[1] and "made-up" not in of_cache.found_tokens[1]
