"""What the pages of a run and of all runs are made of: figures, tables, configuration, log.

Only what lies in the folder is shown; a piece that is missing is left out. How a page looks is in
`report.html.j2`, what a run's and all runs' page say in `run_report.html.j2` and
`index_report.html.j2`; whatever comes from a file is escaped there.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import jinja2

from experiments.findings import best_figure, read_if_there, task_line
from lowrank_tokens.errors import percent_text
from svd_baseline import gain_text
from training.checkpoint import load_checkpoint

LOG_LINES = 40
FIGURES = {  # of each section: pattern of the file and its caption; shown in this order
    "Network against the SVD": {
        "rank_sweep.png": "Error over the rank. Of a run for a task: in the Frobenius norm and of "
        "its head's output. Of another: error and excess of every method, a band up to the 90th "
        "percentile of the test images.",
        "svd_nn_comparison.png": "Every test image: how far each method's error is above the "
        "SVD's; for a head, its error against the SVD's.",
        "rank_per_image.png": "A rank for each image, against one rank for all that stores as "
        "much.",
        "error_heatmap.png": "Mean error of each token of the grid over the test images.",
        "B_row_norm_hist.png": "What each component holds of X's energy (row norms of B where A "
        "is orthonormal), beside the SVD's.",
    },
    "What a task makes of it": {
        "task_sweep.png": "Task error over stored bytes, and what it is below the plain SVD's.",
        "task_calibration.png": "Predicting the task error without running the head.",
    },
    "Single images": {
        "image_*_rank_comparison.png": "What rank keeps: three principal components of X a row, as "
        "red, green and blue; grey where a rank lost them.",
        "image_*_spatial_error_comparison.png": "Where on the photograph the error lies.",
        "image_*_spatial_channel_comparison.png": "The first channels, and those of the largest "
        "and the smallest error: X, network and what network and SVD lose.",
    },
    "Training": {
        "train_val_loss_comparison.png": "What decides the best epoch, over the epochs: for a head "
        "the validation task error, else the validation error above the SVD's; and what else "
        "changed.",
        "loss_curves.png": "Each term of the loss and what it is; the shifts.",
    },
}
RESULTS_OF_ALL = {  # figures of the whole results folder, for the index
    "overview.png": "All trained architectures over the rank: error above the SVD's, and for those "
    "that were trained for a head, task error against the SVD's.",
    "benchmark.png": "Time against error of every method.",
    "ablation_rank*.png": "What learning buys: time against error of random and trained sketches.",
}
PIXELS = 1.6  # of a figure for one of the page, where it has room: letters like the page's own


def run_page(folder: Path, log_dir: Path) -> str:
    """The page of results/<arch>/. Raises InputError where a file in it is damaged."""
    test = read_if_there(folder / "test_results.json")
    comparison = read_if_there(folder / "svd_nn_comparison.json")
    best = folder / "best_model.pt"
    log = newest_log(log_dir, folder)
    config = read_if_there(log / "config.json") if log else {}
    processes = {"processes": config["processes"]} if "processes" in config else {}
    rank = test.get("effective_rank") or comparison.get("rank")
    return _page(
        "run_report.html.j2",
        folder.name + (f", rank {rank}" if rank else ""),
        test.get("data") or comparison.get("data"),
        name=folder.name,
        test=test,
        comparison=comparison,
        task_line=task_line(folder, comparison),
        sweep=read_if_there(folder / "task_sweep.json"),
        images=[
            read_if_there(path)
            for path in sorted(folder.glob("image_*_comparison_results.json"), key=_image_number)
        ],
        history=read_if_there(folder / "history.json") or [],
        benchmark=read_if_there(folder.parent / "benchmark.json"),
        state=load_checkpoint(best) if best.exists() else {},
        environment=(config.get("environment") or {}) | processes,
        log_tail=_log_tail(log),
        figures={title: _figures(folder, captions) for title, captions in FIGURES.items()},
    )


def index_page(results_dir: Path, folders: list[Path], rows: list[dict], found: list[str]) -> str:
    """The page of all runs. rows: overview.json's entry of each architecture that is compared;
    found: what was found, a line each."""
    tests = {folder.name: read_if_there(folder / "test_results.json") for folder in folders}
    of_data = [test["data"] for test in tests.values() if "data" in test]
    # an older overview shows what is no longer there
    captions = {n: text for n, text in RESULTS_OF_ALL.items() if rows or n != "overview.png"}
    first = best_figure(results_dir, folders)
    earlier = [path.parent for f in folders for path in sorted(f.glob("previous-*/report.html"))]
    return _page(
        "index_report.html.j2",
        "Low-rank factors of vision tokens: all runs",
        # one run on demo data is enough to say so first
        min(of_data, key=lambda data: not data.startswith("DEMO"), default=None),
        found=found,
        first=[_figure(*first)] if first else [],
        tests=tests,
        compared={row["arch"]: row for row in rows},
        figures=_figures(results_dir, captions),
        earlier=[str(path.relative_to(results_dir)) for path in earlier],
    )


def _page(body: str, heading: str, data: str | None, **content) -> str:
    """data: what the numbers are of, said first; content: what the template `body` shows."""
    template = TEMPLATES.get_template("report.html.j2")
    return template.render(body=body, heading=heading, data=data or "data not known", **content)


def has_results(folder: Path) -> bool:
    """Whether there is something of a run to show."""
    names = ("history.json", "test_results.json", "svd_nn_comparison.json")
    return any((folder / name).exists() for name in names)


def newest_log(log_dir: Path, folder: Path) -> Path | None:
    """The newest logs_<timestamp>/ whose run wrote into `folder`; None where there is none."""
    for path in sorted(log_dir.glob("logs_*"), reverse=True):
        config = read_if_there(path / "config.json")
        if config and config.get("arch") == folder.name:
            if Path(config.get("results_dir", "")).resolve() == folder.parent.resolve():
                return path
    return None


def _figures(folder: Path, captions: dict[str, str]) -> list[dict]:
    """The figures in `folder` of these file patterns, in their order."""
    return [
        _figure(path, caption)
        for pattern, caption in captions.items()
        for path in sorted(folder.glob(pattern), key=_image_number)
    ]


def _figure(path: Path, caption: str) -> dict:
    """A PNG for the template `show`. Raises OSError where it cannot be read."""
    png = path.read_bytes()
    width = round(int.from_bytes(png[16:20], "big") / PIXELS)  # of the header chunk
    return {"png": base64.b64encode(png).decode("ascii"), "width": width, "caption": caption}


def _image_number(path: Path) -> tuple[int, str]:
    number = path.name.split("_")[1] if path.name.startswith("image_") else ""
    return (int(number) if number.isdigit() else 0, path.name)


def _log_tail(log: Path | None) -> str:
    if log is None or not (log / "training.log").exists():
        return ""
    lines = (log / "training.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])


# ------------------------------------------------------------------------- filters of the templates


def _text(value: object) -> str:
    """A value as a cell; a dash where there is none."""
    if value is None or jinja2.is_undefined(value):
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _epochs(test: dict) -> str:
    """Which epoch is the best; 0 is the untrained model."""
    if "best_epoch" not in test:
        return ""
    return f"{test['best_epoch'] or '0 (untrained)'} of {test['epochs']}"


# of these and of `percent`, None is a value that is undefined, and a missing key was not measured
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.ChainableUndefined,
)
TEMPLATES.filters |= {
    "text": _text,
    "epochs": _epochs,
    "error": lambda v: "" if v is None or jinja2.is_undefined(v) else f"{v:.5f}",
    "percent": lambda v: "" if jinja2.is_undefined(v) else percent_text(v),
    "gain": lambda v: gain_text(None if jinja2.is_undefined(v) else v),
}
