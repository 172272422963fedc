"""What the pages of a run and of all runs show: figures, tables, configuration, log.

Only what lies in the folder is shown; a piece that is missing is left out. `report.html.j2` says
how a page looks and escapes what is in it; here are its parts: lists of paragraphs, tables and
figures, empty where there is nothing to show.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from common.files import read_json
from experiments.findings import AGAIN, best_figure, task_line
from svd_baseline import gain_text, percent_text
from training.checkpoint import load_checkpoint

LOG_LINES = 40
COMPARISON, TASK = "Network against the SVD", "What a task makes of it"
IMAGES, TRAINING = "Single images", "Training"
FIGURES = {  # of each section: pattern of the file and its caption; shown in this order
    COMPARISON: {
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
    TASK: {
        "task_sweep.png": "Task error over stored bytes, and what it is below the plain SVD's.",
        "task_calibration.png": "Predicting the task error without running the head.",
    },
    IMAGES: {
        "image_*_rank_comparison.png": "What rank keeps: three principal components of X a row, as "
        "red, green and blue; grey where a rank lost them.",
        "image_*_spatial_error_comparison.png": "Where on the photograph the error lies.",
        "image_*_spatial_channel_comparison.png": "The first channels, and those of the largest "
        "and the smallest error: X, network and what network and SVD lose.",
    },
    TRAINING: {
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
FOLDER = jinja2.FileSystemLoader(Path(__file__).parent)
STRICT = {"autoescape": True, "trim_blocks": True, "undefined": jinja2.StrictUndefined}
TEMPLATES = jinja2.Environment(loader=FOLDER, **STRICT)

Parts = list[dict]


def page(heading: str, data: str, sections: dict[str, Parts]) -> str:
    """A whole page of titles and what is under each. data: what the numbers are of, said first."""
    template = TEMPLATES.get_template("report.html.j2")
    return template.render(heading=heading, data=data, sections=sections.items())


def paragraph(text: str | dict) -> Parts:
    return [{"kind": "paragraph", "text": text}] if text else []


def fold(title: str, parts: Parts) -> Parts:
    """Parts that are closed until someone opens them; none where there is nothing in them."""
    return [{"kind": "fold", "title": title, "parts": parts}] if parts else []


def items(lines: list[str]) -> Parts:
    return [{"kind": "items", "lines": lines}] if lines else []


def preformatted(text: str) -> Parts:
    return [{"kind": "preformatted", "text": text}]


def link(path: str, text: str) -> dict:
    """A cell, or a paragraph's text: a link to a file at or below the page's folder."""
    return {"href": path, "text": text}


def table(header: Sequence, rows: Sequence[Sequence], text: Sequence[int] = (0,)) -> Parts:
    """text: the columns that hold words, to the left; numbers are to the right."""
    return [{"kind": "table", "header": header, "rows": rows, "text": text}] if rows else []


def figure(path: Path, caption: str) -> Parts:
    """A PNG, embedded, under its caption. Raises OSError where it cannot be read."""
    png = path.read_bytes()
    width = round(int.from_bytes(png[16:20], "big") / PIXELS)  # of the header chunk
    encoded = base64.b64encode(png).decode("ascii")
    return [{"kind": "figure", "png": encoded, "width": width, "caption": caption}]


def has_results(folder: Path) -> bool:
    """Whether there is something of a run to show."""
    names = ("history.json", "test_results.json", "svd_nn_comparison.json")
    return any((folder / name).exists() for name in names)


def run_page(folder: Path, log_dir: Path) -> str:
    """The page of results/<arch>/. Raises UserError where a file in it is damaged."""
    test = _json(folder / "test_results.json")
    comparison = _json(folder / "svd_nn_comparison.json")
    best = folder / "best_model.pt"
    state = load_checkpoint(best) if best.exists() else {}
    log = newest_log(log_dir, folder)
    rank = test.get("effective_rank") or comparison.get("rank")
    data = str(test.get("data") or comparison.get("data") or "data not known")
    heading = folder.name + (f", rank {rank}" if rank else "")
    figures = _figures(folder)
    tables = _box_table(comparison.get("box") or {})
    tables += _rank_per_image_table(comparison.get("rank_per_image") or {})
    numbers = _both_norms_table(comparison) + _test_table(test) + _comparison_table(comparison)
    made = fold("Model, from its checkpoint", _settings(state.get("config", {})))
    made += fold("Flags of the training", _settings(state.get("args", {})))
    made += fold("Environment of the training", _environment(log))
    made += fold("End of the log", _log_tail(log))
    sections = {
        "": paragraph(_finding(comparison)) + paragraph(task_line(folder, comparison)),
        "Numbers": numbers,
        COMPARISON: figures[COMPARISON] + tables,
        TASK: _task_table(_json(folder / "task_sweep.json")) + figures[TASK],
        IMAGES: _image_table(folder) + figures[IMAGES],
        TRAINING: figures[TRAINING] + _epoch_table(folder, test.get("best_epoch")),
        "Speed": _benchmark_parts(folder),
        "How it was made": made,
    }
    return page(heading, data, sections)


def index_page(results_dir: Path, folders: list[Path], rows: list[dict], found: list[str]) -> str:
    """The page of all runs. rows: overview.json's entry of each architecture that is compared;
    found: what was found, a line each."""
    compared = {row["arch"]: row for row in rows}
    tests = {folder.name: _json(folder / "test_results.json") for folder in folders}
    header = "run|factors|rank|rel_error|SVD|excess mean|p90|images/s|best epoch".split("|")
    cells = []
    for folder in folders:
        row, test = compared.get(folder.name), tests[folder.name]
        cells.append([link(f"{folder.name}/report.html", folder.name)])
        if row:
            cells[-1] += [row["factors"], _text(row["rank"])]
            cells[-1] += [_error(row[key]) for key in ("rel_error", "optimum")]
            cells[-1] += [percent_text(row[key]) for key in ("excess_mean", "excess_p90")]
            cells[-1] += [f"{row['samples_per_s']:.1f}", _epochs(row)]
        else:
            rank = test.get("effective_rank")
            metrics = (test.get("ranks") or {}).get(str(rank), {})
            cells[-1] += ["", _text(rank), _error(_mean(metrics, "rel_error")), ""]
            cells[-1] += [*_excess(metrics), "", _epochs(test)]
    of_data = [str(test["data"]) for test in tests.values() if "data" in test]
    # one run on demo data is enough to say so first
    data = min(of_data, key=lambda d: not d.startswith("DEMO"), default="data not known")
    figures = [
        part
        for pattern, caption in RESULTS_OF_ALL.items()
        for path in sorted(results_dir.glob(pattern))
        if rows or pattern != "overview.png"  # an older one shows what is no longer there
        for part in figure(path, caption)
    ]
    words = (
        "Relative error and excess over the SVD's (the optimum) are of the test images, in the "
        "Frobenius norm, at the largest rank that all runs were compared at; a run's name leads to "
        "its page."
    )
    first = best_figure(results_dir, folders)
    sections = {
        "": items(found) + (figure(*first) if first else []),
        "Runs": paragraph(words) + table(header, cells, text=(0, 1)) + figures,
        "Earlier runs": _earlier_runs(results_dir, folders),
    }
    return page("Low-rank factors of vision tokens: all runs", data, sections)


def newest_log(log_dir: Path, folder: Path) -> Path | None:
    """The newest logs_<timestamp>/ whose run wrote into `folder`; None where there is none."""
    for path in sorted(log_dir.glob("logs_*"), reverse=True):
        config = _json(path / "config.json")
        if config and config.get("arch") == folder.name:
            if Path(config.get("results_dir", "")).resolve() == folder.parent.resolve():
                return path
    return None


def _earlier_runs(results_dir: Path, folders: list[Path]) -> Parts:
    """Links to the pages of runs that a later one moved aside."""
    pages = [path for f in folders for path in sorted(f.glob("previous-*/report.html"))]
    paths = [path.relative_to(results_dir) for path in pages]
    return [part for p in paths for part in paragraph(link(str(p), str(p.parent)))]


def _json(path: Path) -> dict | list:
    return read_json(path, AGAIN) if path.exists() else {}


def _figures(folder: Path) -> dict[str, Parts]:
    """Section → its figures, in the order of FIGURES."""
    return {
        section: [
            part
            for pattern, caption in captions.items()
            for path in sorted(folder.glob(pattern), key=_image_number)
            for part in figure(path, caption)
        ]
        for section, captions in FIGURES.items()
    }


def _image_number(path: Path) -> tuple[int, str]:
    number = path.name.split("_")[1] if path.name.startswith("image_") else ""
    return (int(number) if number.isdigit() else 0, path.name)


def _text(value: object) -> str:
    """A value as a cell; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _mean(metrics: dict, name: str, key: str = "mean") -> float | None:
    return (metrics.get(name) or {}).get(key)


def _excess(metrics: dict) -> list[str]:
    """Mean and 90th percentile of the excess; a dash where undefined, nothing if not measured."""
    if "excess_pct" not in metrics:
        return ["", ""]
    return [percent_text(metrics["excess_pct"][key]) for key in ("mean", "p90")]


def _epochs(test: dict) -> str:
    """Which epoch is the best; 0 is the untrained model."""
    if "best_epoch" not in test:
        return ""
    return f"{test['best_epoch'] or '0 (untrained)'} of {test['epochs']}"


def _finding(comparison: dict) -> str:
    """What the comparison found, in a sentence; nothing where its own rank is not in it."""
    rank = str(comparison.get("rank"))
    methods = (comparison.get("ranks") or {}).get(rank)
    if not methods:
        return ""
    mean, p90 = _excess(methods["network"])
    text = f"At rank {rank} the network's relative error is {mean} above the SVD's (mean of "
    text += f"{comparison['n_images']} {comparison['split']} images in {comparison['n_groups']} "
    text += f"groups; 90th percentile {p90}"
    interval = (comparison.get("network_excess_pct_95") or {}).get(rank)
    if interval:
        text += f"; approximate 95 % interval of the mean {interval[0]:.4f} to {interval[1]:.4f} %"
    return text + "). No matrix of this rank can have a smaller error than the SVD's."


def _test_table(test: dict) -> Parts:
    rows = [
        [rank, _error(_mean(m, "rel_error")), _error(_mean(m, "rel_error", "p90")), *_excess(m)]
        for rank, m in (test.get("ranks") or {}).items()
    ]
    if not rows:
        return []
    words = f"The best checkpoint (epoch {_epochs(test)}) on {test['n_images']} test images."
    if test.get("best_epoch") == 0:
        words += " Training made no epoch better than that on the validation images."
    header = ["rank", "rel_error mean", "p90", "excess mean", "p90"]
    return paragraph(words) + table(header, rows, text=())


def _comparison_table(comparison: dict) -> Parts:
    """The optimum, and how far each method is above it."""
    ranks = comparison.get("ranks") or {}
    others = [m for m in next(iter(ranks.values()), {}) if m not in ("network", "svd")]
    rows = []
    for rank, methods in ranks.items():
        rows.append([rank, _error(_mean(methods.get("svd", {}), "rel_error"))])
        rows[-1] += _excess(methods.get("network", {}))
        rows[-1] += [_excess(methods.get(name, {}))[0] for name in others]
    if not rows:
        return []
    words = "The SVD's rel_error and the mean excess of every method over it, on the same "
    words += f"{comparison['n_images']} {comparison['split']} images."
    header = ["rank", "SVD", "network", "p90", *(name.replace("_", " ") for name in others)]
    return paragraph(words) + table(header, rows, text=())


def _box_table(box: dict) -> Parts:
    if not box.get("n_images"):
        return []
    words = (
        f"Relative error at the tokens of the answer's box ({box['tokens_inside_pct']:.1f} % of "
        f"them) and at the others, rank {box['rank']}, mean of {box['n_images']} test images."
    )
    rows = []
    for name in ("network", "svd"):
        difference = box[name]["inside_minus_outside"]
        interval = " to ".join(f"{v:.2g}" for v in difference.get("interval_95") or [])
        errors = [_error(box[name][part]["mean"]) for part in ("inside", "outside")]
        rows.append([name, *errors, f"{difference['mean']:.2g}", interval])
    header = ["method", "in the box", "outside", "inside − outside", "approximate 95 % interval"]
    return paragraph(words) + table(header, rows)


def _rank_per_image_table(budget: dict) -> Parts:
    if not budget:
        return []
    rows = []
    for name in ("network", "svd"):
        own, fixed = budget[name], budget[name]["fixed"]
        ranks = "{mean:.1f} ({min} to {max})".format(**own["ranks"])
        for label, entry in ((ranks, own), (f"{fixed['rank']} for all", fixed)):
            errors = [_error(entry["rel_error"][key]) for key in ("mean", "p90", "max")]
            rows.append([name, label, f"{entry['stored_values']:,}", *errors])
    words = f"Ranks per image (--{budget['mode']} {budget[budget['mode']]:g})."
    header = ["method", "ranks", "values stored", "rel_error mean", "p90", "max"]
    return paragraph(words) + table(header, rows, text=(0, 1))


def _task_table(sweep: dict) -> Parts:
    """Mean task error of every method, and by how many per cent it is below the plain SVD's."""
    if not sweep:
        return []
    methods = {n: m for n, m in sweep["methods"].items() if n != "token_averaging"}
    ranks = list(methods["svd"])
    rows = []
    for name, entries in methods.items():
        cells = []
        for entry in (entries.get(rank) for rank in ranks):
            gain = entry["gain_pct"]["mean"] if entry and "gain_pct" in entry else None
            below = "" if gain is None else f" ({round(gain)} %)"
            cells.append(f"{entry['task_error']['mean']:.4f}{below}" if entry else "–")
        rows.append([name.replace("_", " "), *cells])
    words = (
        f"Task error of the head {sweep['head']} on {sweep['n_images']} {sweep['split']} images, "
        "and in brackets by how much it is below the plain SVD's."
    )
    return paragraph(words) + table(["method", *(f"rank {r}" for r in ranks)], rows)


def _both_norms_table(comparison: dict) -> Parts:
    """Network and SVD in the Frobenius norm and in the head's, side by side."""
    task = comparison.get("task")
    if not task:
        return []
    closed = any("svd_in_metric" in methods for methods in task["ranks"].values())
    names = ["svd", "network"] + ["svd_in_metric"] * closed
    rows = []
    for rank, methods in task["ranks"].items():
        plain = comparison["ranks"][rank]
        errors = [_error(_mean(plain[name], "rel_error")) for name in names[:2]]
        errors += [_error(methods[name]["mean"]) for name in names]
        rows.append([rank, *errors, *(gain_text(methods[n]["gain_pct"]) for n in names[1:])])
    words = (
        "Both norms: rel_error, of which no matrix of the rank has less than the SVD, and task "
        f"error of the head {task['head']}; below: by how many per cent it is below the SVD's, "
        "[approximate 95 % interval]."
    )
    header = ["rank", "rel_error SVD", "network", "task error SVD", "network"]
    header += ["SVD in the metric"] * closed + ["network below"] + ["in the metric below"] * closed
    return paragraph(words) + table(header, rows, text=())


def _image_table(folder: Path) -> Parts:
    paths = sorted(folder.glob("image_*_comparison_results.json"), key=_image_number)
    rows = []
    for image in map(_json, paths):
        network, svd = image.get("network", {}), image.get("svd", {})
        rows.append([_text(image.get(key)) for key in ("image_idx", "split", "rank")])
        rows[-1] += [_error(network.get("rel_error")), _error(svd.get("rel_error"))]
        rows[-1] += [percent_text(network.get("excess_pct")), _text(image.get("question"))]
        rows[-1].append(", ".join(map(str, image.get("answers") or [])))
    header = ["image", "part", "rank", "rel_error", "SVD", "excess", "question", "answers"]
    return table(header, rows, text=(1, 6, 7))


def _epoch_table(folder: Path, best: int | None) -> Parts:
    """Of the history the untrained start, the best epoch and the last ones."""
    history = _json(folder / "history.json") or []
    keys = """train_loss val_mse val_optimum_mse val_rel_error val_excess_pct effective_rank lr
        samples_per_s""".split()
    if any("val_task_error" in record for record in history):
        keys = ["val_task_error", *keys]
    shown = [r for r in history if r["epoch"] in (0, best) or r in history[-10:]]
    rows = [[_text(r["epoch"]), *(_text(r.get(key)) for key in keys)] for r in shown]
    return table(["epoch", *(key.replace("_", " ") for key in keys)], rows, text=())


def _benchmark_parts(folder: Path) -> Parts:
    """Of results/benchmark.json what this network needs, and where it was measured."""
    found = _json(folder.parent / "benchmark.json")
    records = [r for r in found.get("records", []) if r.get("arch") == folder.name]
    keys = {key: key for key in ("rank", "K", "p", "batch")}
    keys |= {"ms_median": "ms a matrix", "ms_iqr": "interquartile range"}
    keys |= {"matrices_per_s": "matrices/s", "excess_mean": "excess mean %"}
    keys |= {"excess_p90": "p90 %", "peak_mb": "peak MB"}
    rows = [[_text(record.get(key)) for key in keys] for record in records]
    if not rows:
        return []
    environment = found.get("environment", {}).items()
    where = "  ".join(f"{k} {_text(v)}" for k, v in environment if not isinstance(v, dict))
    return table(list(keys.values()), rows, text=()) + paragraph(f"Measured on: {where}")


def _settings(values: dict) -> Parts:
    return table(["name", "value"], [[k, _text(v)] for k, v in values.items()], text=(0, 1))


def _environment(log: Path | None) -> Parts:
    config = _json(log / "config.json") if log else {}
    shown = dict(config.get("environment") or {})
    if "processes" in config:
        shown["processes"] = config["processes"]
    return _settings(shown)


def _log_tail(log: Path | None) -> Parts:
    path = log / "training.log" if log else None
    if path is None or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return preformatted("\n".join(lines[-LOG_LINES:]))
