"""The one call on a GPU, rehearsed on the CPU at tiny sizes: nothing in it may fail there."""

import json
import time

import pytest
import torch

from common import cli
from experiments import gpu_bench, gpu_check

# what a CPU lacks, by name
SKIPPED = {"host waits", "out of memory", "svd_gesvda"}


def call(out, *flags):
    argv = ["--out", str(out), "--device", "cpu", *map(str, flags)]
    status = gpu_check.main(cli.parse(gpu_check.get_args_parser(), argv))
    return status, json.loads((out / "gpu_check.json").read_text())


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_every_check_of_a_part_runs_on_the_cpu_and_only_cuda_is_missing(part, tiny_cache, tmp_path):
    status, report = call(tmp_path, "--parts", part, "--in_process", "--cache_dir", tiny_cache)
    (found,) = report["parts"]
    assert found["status"] == "done" and found["rows"]
    for row in found["rows"]:
        assert row["status"] in ("ok", "measured", "skipped"), row
    assert {r["what"] for r in found["rows"] if r["status"] == "skipped"} <= SKIPPED
    assert status == 0
    table = (tmp_path / "gpu_check.md").read_text()
    assert all(row["what"] in table for row in found["rows"]) and torch.__version__ in table
    assert {p.name for p in tmp_path.iterdir()} == {"gpu_check.json", "gpu_check.md"}


def test_results_that_differ_or_are_not_numbers_are_no_ok():
    assert gpu_bench.compared("x", 1e-3, 1e-2)["status"] == "ok"
    assert gpu_bench.compared("x", 1e-1, 1e-2)["status"] == "differs"
    assert gpu_bench.compared("x", float("nan"), 1e-2)["status"] == "differs"


def test_a_check_that_raises_is_a_row_and_the_next_one_runs(monkeypatch):
    def broken(setting):
        yield gpu_bench.row("half", 1.0)
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    checks = {"one": broken, "two": lambda setting: [gpu_bench.row("whole", 2.0)]}
    checks["three"] = lambda setting: setting.need_cuda("this")
    module = type("module", (), {"CHECKS": {"part": checks}})
    monkeypatch.setattr(gpu_bench.importlib, "import_module", lambda name: module)
    rows = list(gpu_bench.rows_of("part", "x", gpu_bench.Setting("cpu", True, "", None)))
    assert [row["status"] for row in rows] == ["measured", "failed", "measured", "skipped"]
    assert rows[1]["note"] == "RuntimeError: CUDA error: an illegal"


def test_a_module_that_needs_a_missing_library_is_skipped_by_name(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'constriction'", name="constriction")

    monkeypatch.setattr(gpu_bench.importlib, "import_module", missing)
    (row,) = gpu_bench.rows_of("codec", "x", gpu_bench.Setting("cpu", True, "", None))
    assert row["status"] == "skipped" and "constriction" in row["note"]


def test_a_part_that_is_cut_off_keeps_its_rows_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "STARTS_IN", 0)
    monkeypatch.setattr(gpu_check, "work", sleeping)
    status, report = call(tmp_path, "--parts", "svd", "training", "--time_limit", "40")
    assert status == 1
    first, second = report["parts"]
    assert first["status"].startswith("cut off at its limit") and first["rows"] == [KEPT]
    assert second["status"] == "done"


KEPT = gpu_bench.row("kept", 1.0)


def sleeping(name, setting, path):
    """In place of `work`: a part that never ends, and one that ends at once."""
    if name == "svd":
        path.write_text(json.dumps(KEPT) + "\n")
        time.sleep(600)


def test_packed_tokens_are_the_caches_and_serve_instead_of_it(tiny_cache, tmp_path):
    argv = ["--out", str(tmp_path), "--cache_dir", str(tiny_cache), "--pack", "3"]
    assert gpu_check.main(cli.parse(gpu_check.get_args_parser(), argv)) == 0
    path = str(tmp_path / "tokens.safetensors")
    cached = gpu_bench.Setting("cpu", True, str(tiny_cache), None)
    packed = gpu_bench.Setting("cpu", True, "nowhere", path)
    assert packed.found_tokens[1] == cached.found_tokens[1]
    assert packed.found_tokens[0].equal(cached.found_tokens[0][:3])
    made_up = gpu_bench.Setting("cpu", True, "nowhere", None)
    assert "made-up" in made_up.found_tokens[1]
