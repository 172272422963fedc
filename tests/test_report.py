"""report.html and index.html: whole in themselves, complete, safe; made of whatever is there."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from commands import MODULES
from PIL import Image

from experiments import findings, report_page

HOSTILE = '<script>alert("x")</script><img src="http://example.org/x.png">&\'"'
PATTERNS = [name for captions in report_page.FIGURES.values() for name in captions]
FIGURES = [
    "svd_nn_comparison.png",
    "rank_sweep.png",
    "error_heatmap.png",
    "loss_curves.png",
    "train_val_loss_comparison.png",
    "image_10_rank_comparison.png",
    "image_9_rank_comparison.png",
    "task_sweep.png",
]


class Page(HTMLParser):
    """What a page refers to, shows and says."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.images, self.words, self.inside = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.inside.append(tag)
        assert not [name for name in attributes if name.startswith("on")]
        assert tag == "img" or "src" not in attributes
        if tag == "img":
            kind, data = attributes["src"].split(",", 1)
            assert kind == "data:image/png;base64" and attributes["alt"]
            self.images.append(base64.b64decode(data))
        if "href" in attributes:
            assert tag == "a"
            self.links.append(attributes["href"])

    def handle_data(self, data):
        if self.inside[-1:] == ["style"]:
            assert "url(" not in data and "@import" not in data
        elif data.strip():
            self.words.append(data.strip())

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def metrics(error, excess):
    both = {"rel_error": error, "excess_pct": excess, "cosine": 1 - error}
    return {name: {"mean": v, "p90": 1.5 * v} for name, v in both.items()}


@pytest.fixture
def results(tmp_path):
    """results/ResMLP with everything but a checkpoint, results/MLP with test numbers only."""
    folder, data = tmp_path / "results" / "ResMLP", f"DEMO data, {HOSTILE}"
    methods = {"network": metrics(0.2, 1.25), "svd": metrics(0.19, 0.0), "pca": metrics(0.4, 99.5)}
    of_box = {
        "inside": {"mean": 0.0123, "p90": 0.02},
        "outside": {"mean": 0.0456, "p90": 0.05},
        "inside_minus_outside": {"mean": -0.03, "interval_95": None},
    }
    box = {"rank": 4, "n_images": 6, "tokens_inside_pct": 10.0, "network": of_box, "svd": of_box}
    test = {
        "data": data,
        "effective_rank": 4,
        "n_images": 6,
        "best_epoch": 1,
        "epochs": 2,
        "ranks": {"4": metrics(0.2, 1.25)},
    }
    errors = {"stored_values": 12345, "rel_error": {"mean": 0.21, "p90": 0.22, "max": 0.23}}
    of_ranks = {"ranks": {"mean": 3.5, "min": 2, "max": 4}, "fixed": errors | {"rank": 3}} | errors
    per_image = {"mode": "target_error", "target_error": 0.2, "network": of_ranks, "svd": of_ranks}
    gain = {"mean": 12.3, "interval_95": [10.0, 15.0]}
    of_task = {"svd": {"mean": 0.5}, "network": {"mean": 0.44, "gain_pct": gain}}
    task = {"head": "saliency", "head_sha256": "a", "ranks": {"4": of_task}}
    write(
        folder / "svd_nn_comparison.json",
        {
            "data": data,
            "factors": "projected",
            "rank": 4,
            "split": "test",
            "n_images": 6,
            "n_groups": 2,
            "ranks": {"4": methods},
            "network_excess_pct_95": {"4": [1.0, 1.5]},
            "box": box,
            "rank_per_image": per_image,
            "task": task,
        },
    )
    write(folder / "test_results.json", test)
    epochs = [{"epoch": n, "train_loss": 1.5, "val_mse": 0.1, "samples_per_s": 7.0} for n in (1, 2)]
    write(folder / "history.json", epochs)
    tasks = {
        "svd": {"4": {"task_error": {"mean": 0.5}}},
        "svd_in_metric": {"4": {"task_error": {"mean": 0.25}, "gain_pct": {"mean": 50.0}}},
        "token_averaging": {"2": {"task_error": {"mean": 0.75}}},
    }
    write(
        folder / "task_sweep.json",
        {"head": "saliency", "n_images": 6, "split": "test", "methods": tasks},
    )
    write(
        folder / "image_9_comparison_results.json",
        {
            "image_idx": 9,
            "split": "val",
            "rank": 4,
            "question": HOSTILE,
            "answers": [HOSTILE],
            "network": {"rel_error": 0.3, "excess_pct": None},
            "svd": {"rel_error": 0.29},
        },
    )
    record = {"arch": "ResMLP", "rank": 4, "K": 1, "p": 2, "batch": 8, "ms_median": 1.2345}
    write(
        folder.parent / "benchmark.json",
        {
            "environment": {"device": HOSTILE},
            "records": [record, record | {"arch": "MLP", "ms_median": 9.8765}],
        },
    )
    for seed, name in enumerate(FIGURES):
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    write(folder.parent / "MLP" / "test_results.json", test)
    log = tmp_path / "log" / "logs_20260102_000000"
    write(
        log / "config.json",
        {
            "arch": "ResMLP",
            "results_dir": str(folder.parent),
            "processes": 1,
            "environment": {"torch": "2.13.0"},
        },
    )
    (log / "training.log").write_text("".join(f"line {n} {HOSTILE}\n" for n in range(100)))
    return folder.parent


def run_page(results, arch="ResMLP"):
    return report_page.run_page(results / arch, results.parent / "log")


def test_a_runs_page_embeds_every_figure_and_needs_no_network_and_no_script(results):
    page = Page(run_page(results))
    shown = [path for name in PATTERNS for path in sorted((results / "ResMLP").glob(name))]
    assert len(page.images) == len(FIGURES) == len(shown)
    assert set(page.images) == {path.read_bytes() for path in shown}
    assert page.links == [] and not {"script", "link", "iframe", "object"} & set(page.tags)
    # 9 before 10
    images = [(results / "ResMLP" / f"image_{i}_rank_comparison.png").read_bytes() for i in (9, 10)]
    assert page.images.index(images[0]) == page.images.index(images[1]) - 1


def test_a_runs_page_shows_the_numbers_of_its_files_and_demo_first(results):
    page = Page(run_page(results))
    body = page.words[page.words.index(next(w for w in page.words if w.startswith("DEMO data"))) :]
    assert body[1] == "ResMLP, rank 4" and page.words[0].startswith("DEMO – ResMLP")
    for cell in (
        "1.2500 %",
        "0.19000",
        "99.5000 %",
        "0.01230",
        "0.04560",
        "1.2345",
        "2.13.0",
        "0.2500 (50 %)",
        "3.5 (2 to 4)",
        "3 for all",
        "12,345",
        "0.23000",
        "0.44000",
        "12.3 [10.0, 15.0]",
    ):
        assert cell in page.words
    text = " ".join(page.words)
    assert "1.2500 % above the SVD's" in text and "interval of the mean 1.0000 to 1.5000 %" in text
    assert "9.8765" not in text  # another network's
    assert "line 99" in text and "line 60" in text and "line 59" not in text


def test_text_from_files_is_escaped_everywhere(results):
    # a run's own name, and an earlier one's
    renamed = (results / "ResMLP").rename(results / '"><script>')
    (renamed / "previous-<script>").mkdir()
    (renamed / "previous-<script>" / "report.html").write_text("an earlier run's")
    config = {"arch": renamed.name, "results_dir": str(results), "environment": {"x": HOSTILE}}
    write(results.parent / "log" / "logs_20260103_000000" / "config.json", config)
    (results.parent / "log" / "logs_20260103_000000" / "training.log").write_text(HOSTILE)
    run = run_page(results, renamed.name)
    index = report_page.index_page(results, [renamed], [], [HOSTILE])
    assert "<script" not in run + index and "alert(" in index
    assert {tag for text in (run, index) for tag in Page(text).tags} <= set(
        """html head meta title style body p h1 h2 div table thead tbody tr th td a ul li figure
        figcaption img details summary pre""".split()
    )
    words = Page(run).words
    assert words.count(HOSTILE) == 4  # question, answer, environment, log
    assert Page(index).links == [
        "%22%3E%3Cscript%3E/report.html",
        "%22%3E%3Cscript%3E/previous-%3Cscript%3E/report.html",
    ]


@pytest.mark.parametrize(
    "missing",
    [
        "svd_nn_comparison.json",
        "test_results.json",
        "history.json",
        "../benchmark.json",
        "../../log",
        "*.png",
    ],
)
def test_a_missing_piece_is_left_out_and_the_rest_is_shown(results, missing):
    whole = Page(run_page(results))
    folder = results / "ResMLP"
    for path in list(folder.glob(missing)) if "*" in missing else [folder / missing]:
        path.rename(results.parent / f"elsewhere {path.name}")
    page = Page(run_page(results))
    assert 0 < len(page.words) < len(whole.words)
    assert page.images == ([] if "*" in missing else whole.images)
    assert "None" not in page.words and not {"nan", "NaN"} & set(page.words)


def test_a_run_with_test_numbers_only_has_a_page(results):
    page = Page(run_page(results, "MLP"))
    assert "1.2500 %" in page.words and page.images == []


def test_the_index_links_every_run_with_its_numbers_and_shows_the_overview(results, script):
    older = results / "ResMLP" / "previous-20260101-000000"
    older.mkdir()
    (older / "report.html").write_text("an earlier run's")
    done = script(
        "experiments.make_report", "--results_dir", results, "--log_dir", results.parent / "log"
    )
    assert done.returncode == 0, done.stderr
    wrote, head, *found = done.stdout.splitlines()[-6:]
    assert "index.html: open that one in a browser" in done.stdout and len(found) <= 5
    page = Page((results / "index.html").read_text())
    assert page.links == [
        "ResMLP/report.html",
        "MLP/report.html",
        "ResMLP/previous-20260101-000000/report.html",
    ]
    assert all((results / link).exists() for link in page.links)
    assert page.images == [(results / "overview.png").read_bytes()]
    assert {"0.20000", "0.19000", "1.2500 %", "7.0", "1 of 2"} <= set(page.words)
    assert page.words[0].startswith("DEMO – ")


def test_the_newest_log_of_the_same_architecture_and_folder_is_taken(results):
    log = results.parent / "log"
    for day, config in (
        ("03", {"arch": "MLP", "results_dir": str(results)}),
        ("04", {"arch": "ResMLP", "results_dir": str(results.parent / "other")}),
        ("01", {"arch": "ResMLP", "results_dir": str(results)}),
    ):
        write(log / f"logs_202601{day}_000000" / "config.json", config)
    found = report_page.newest_log(log, results / "ResMLP")
    assert found.name == "logs_20260102_000000"


def test_every_figure_that_a_script_names_for_an_architecture_has_a_place_in_the_page():
    written = set()
    for path in MODULES:
        if path.parent.name != "experiments":
            written |= set(re.findall(r'folder / "(\w+\.png)"', path.read_text()))
    assert {"loss_curves.png", "rank_sweep.png"} <= written <= set(PATTERNS)


def test_what_was_found_is_at_most_five_lines_and_the_closed_form_is_never_the_networks(results):
    folder = results / "ResMLP"
    comparison = json.loads((folder / "svd_nn_comparison.json").read_text())
    gain = {"mean": 48.04, "interval_95": [40.0, 55.0]}
    task = {"head": "saliency", "head_sha256": "a", "ranks": {"4": {"network": {"gain_pct": gain}}}}
    comparison |= {"num_tokens": 256, "feature_dim": 1536, "task": task, "data": "DEMO data"}
    write(folder / "svd_nn_comparison.json", comparison)
    sizes = {"coded": {"alone": 5000.0}, "factors_int8": {"alone": 28000.0}}
    write(
        results / "bytes.json",
        {
            "head": "saliency",
            "codec": {"bytes": 4_700_000},
            "n_images": 24,
            "n_groups": 8,
            "tables": {"raw_error": {"0.16": sizes}, "task_error": {"0.05": sizes}},
        },
    )
    epochs = [{"epoch": n, "val_task_error": e} for n, e in enumerate((0.07, 0.049))]
    write(folder / "history.json", epochs)
    lines = findings.findings(results, [folder])
    assert lines == [
        "786 kB of tokens in bf16 → 5.00 kB an image at raw_error 0.16, 157 times fewer; SVD "
        "factors in int8 take 28.0 kB; the codec file, 4.7 MB, is shared by all images",
        "at rank 4 task error (head saliency) below the SVD's: trained network 48.0 % [40.0, "
        "55.0]; closed-form metric not measured (python -m experiments.estimate_metric --head "
        "saliency)",
        "at rank 4 in the Frobenius norm the SVD wins, by theorem: rel_error of ResMLP is 1.2 % "
        "[1, 1.5] above the SVD's",
        "training: validation task error 0.0700 untrained → 0.0490 at epoch 1 of 2, 30 % less",
        "measured on 6 test images of 2 groups, 24 test images of 8 groups (bytes); [ ]: "
        "approximate 95 % intervals over groups; DEMO data",
    ]
    # the closed form is named beside the network where either command has measured it
    sweep = {
        "head_sha256": "a",
        "n_images": 6,
        "methods": {"svd_in_metric": {"4": {"gain_pct": gain}}},
    }
    write(folder / "task_sweep.json", sweep)
    assert findings.findings(results, [folder])[1].endswith(
        "closed-form metric 48.0 % [40.0, 55.0]"
    )
    write(folder / "task_sweep.json", sweep | {"head_sha256": "another head's"})
    assert "not measured" in findings.findings(results, [folder])[1]
    write(folder / "task_sweep.json", sweep | {"n_images": 2})
    assert "not measured" in findings.findings(results, [folder])[1]
    ranks = {"4": {"network": {"gain_pct": gain}, "svd_in_metric": {"gain_pct": gain}}}
    beside = comparison | {"task": task | {"metric_images": 25, "ranks": ranks}}
    write(folder / "svd_nn_comparison.json", beside)
    assert "closed-form metric (of 25 images) 48.0 %" in findings.findings(results, [folder])[1]
    begun = comparison | {"task": task | {"network_metric_sha256": "of a metric"}}
    write(folder / "svd_nn_comparison.json", begun)
    line = findings.findings(results, [folder])[1]
    assert "trained network, begun at the closed form, 48.0 %" in line
    # without a codec and a task the rest is said
    (results / "bytes.json").unlink()
    write(folder / "svd_nn_comparison.json", comparison | {"task": None})
    assert [line.split()[0] for line in findings.findings(results, [folder])] == [
        "at",
        "training:",
        "measured",
    ]
    assert findings.findings(results, []) == []


def test_the_index_opens_with_the_lines_and_the_best_figure_and_folds_hide_the_flags(results):
    folder = results / "ResMLP"
    write(folder / "history.json", [{"epoch": 0, "val_task_error": 0.07}])
    page = Page(report_page.index_page(results, [folder], [], ["a line", "another"]))
    assert page.tags.index("li") < page.tags.index("img") < page.tags.index("table")
    assert page.images[0] == (folder / "train_val_loss_comparison.png").read_bytes()
    Image.new("RGB", (40, 30)).save(results / "bytes.png")
    page = Page(report_page.index_page(results, [folder], [], ["a line"]))
    assert page.images[0] == (results / "bytes.png").read_bytes()
    run = Page(run_page(results))
    assert run.tags.count("details") == run.tags.count("summary") == 2  # environment, log
    assert run.tags.index("details") > max(i for i, tag in enumerate(run.tags) if tag == "img")
