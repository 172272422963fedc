"""The report: whole in itself, safe, of one cache; and five closing lines that are the files'."""

import json
from pathlib import Path

import jinja2
import pytest

from experiments import report
from lowrank_tokens.files import with_content_hash, write_json

HOSTILE = '<script>alert("x")</script>'
DATA = f"DEMO data, {HOSTILE}"


def point(size, raw_error, box):
    values = {"bytes": size, "raw_error": raw_error, "box_precision": box}
    return {"knob": 1, **{name: {"mean": value} for name, value in values.items()}}


def methods(excess):
    values = {"network": (0.202, excess), "svd": (0.2, 0.0), "random_sketch": (0.201, 0.5)}
    return {
        name: {"rel_error": {"mean": error}, "excess_pct": {"mean": pct}}
        for name, (error, pct) in values.items()
    }


def comparison(arch="ResMLP", cache="a", task=True):
    gains = {"network": 9.0, "svd_in_metric": 16.0}
    of_task = {"svd": {"mean": 0.5}} | {
        name: {"mean": 0.4, "gain_pct": {"mean": gain, "interval_95": None}}
        for name, gain in gains.items()
    }
    seen = {"box_precision": {"mean": 0.7}}
    return {
        "arch": arch,
        "factors": "projected",
        "trained_for": "saliency" if task else None,
        "rank": 16,
        "n_images": 6,
        "n_groups": 2,
        "data": DATA,
        "cache_sha256": cache,
        "num_tokens": 256,
        "feature_dim": 2048,
        "ranks": {"8": methods(0.1), "16": methods(15.2802)},
        "task": {"head": "saliency", "ranks": {"16": of_task}} if task else None,
        "readers": {"full": {}, "ranks": {"16": {"network": seen, "svd": seen}}},
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    """results/ResMLP trained for its head, results/MLP in the Frobenius norm."""
    monkeypatch.setattr(report, "load_model", lambda path, device: (FakeModel(), {}))
    folder = tmp_path / "results"
    for arch, task in (("ResMLP", True), ("MLP", False)):
        write_json(
            folder / arch / "svd_nn_comparison.json",
            with_content_hash(comparison(arch, task=task)),
        )
        test = with_content_hash({"best_epoch": 1, "epochs": 2})
        write_json(folder / arch / "test_results.json", test)
        epochs = [{"epoch": 0}] + [{"epoch": i, "samples_per_s": 20.0 + i} for i in (1, 2)]
        write_json(folder / arch / "history.json", epochs)
        (folder / arch / "best_model.pt").write_bytes(b"")
        (folder / arch / "rank_sweep.png").write_bytes(arch.encode())
    return folder


class FakeModel:
    def parameters(self):
        return []


def run(results, capsys):
    report.main(report.get_args_parser().parse_args(["--results_dir", str(results)]))
    return capsys.readouterr().out


def test_the_page_holds_every_figure_and_refers_to_nothing_outside(results, capsys):
    run(results, capsys)
    page = (results / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # two sweeps, and architectures.png
    for word in ("<script", "http://", "https://", "<link"):
        assert word not in page
    assert str(jinja2.filters.do_forceescape(DATA)) in page
    assert "ResMLP, for saliency" in page


def test_results_of_another_cache_are_left_out_with_a_note(results, capsys):
    path = results / "ResMLP" / "svd_nn_comparison.json"
    write_json(path, with_content_hash(comparison("ResMLP", cache="b")))
    write_json(results / "bytes.json", {"cache_sha256": "a", "methods": {}})
    printed = run(results, capsys)  # ResMLP's is the newest
    assert "MLP is left out: another cache" in printed
    assert "bytes.json is left out: it was made from another cache" in printed
    page = (results / "report.html").read_text()
    assert "ResMLP" in page and "<td>MLP" not in page


def test_the_closing_lines_say_bytes_readers_task_reconstruction_and_training(results, capsys):
    full = {"bytes": {"mean": 1048576}, "box_precision": {"mean": 0.84}}
    found = {
        "coded": [point(3000, 0.3, 0.6), point(9000, 0.17, 0.8)],
        "factors_quantised": [point(40000, 0.15, 0.8)],
    }
    coded = {"cache_sha256": "a", "methods": found, "full_tokens": full}
    write_json(results / "bytes.json", coded)
    printed = run(results, capsys).partition("found:\n")[2].splitlines()
    assert [line.split(":")[0].strip() for line in printed] == [
        "bytes",
        "readers",
        "task",
        "reconstruction",
        "training",
    ]
    assert "1049 kB of tokens become 9.0 kB an image at raw_error 0.170" in printed[0]
    assert "quantised SVD factors take 40.0 kB an image at raw_error 0.150" in printed[0]
    assert "0.800 on those tokens, 0.840 on full ones" in printed[1]
    assert "9.0 % below" in printed[2] and "16.0 % by the closed form" in printed[2]
    assert "15.3 % above" in printed[3]
    assert "epoch 1 of 2" in printed[4]


def test_networks_of_other_ranks_stand_side_by_side(results, capsys):
    of_rank_8 = comparison("MLP", task=False) | {"rank": 8, "ranks": {"8": methods(0.1)}}
    write_json(results / "MLP" / "svd_nn_comparison.json", with_content_hash(of_rank_8))
    printed = run(results, capsys)
    assert "at rank 16 the network's error is 15.3 % above" in printed  # the only one at 16


def test_without_results_or_with_changed_ones_there_is_one_line(results, script):
    done = script("experiments.report", "--results_dir", "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for words in ("error: ", "nowhere", "train_real_data.py", "compare_svd_nn.py"):
        assert words in done.stderr
    path = Path(results / "MLP" / "test_results.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 3}))
    done = script("experiments.report", "--results_dir", results)
    assert done.returncode == 2 and "is not as it was written" in done.stderr
