"""Set all trained networks side by side, and say in five lines what was found.

    python -m experiments.report
    python -m experiments.report --results_dir results results_task

Reads what train_real_data.py, compare_svd_nn.py and experiments.compare_bytes wrote, and computes
nothing. Writes report.html (whole in itself: no script, no network) and architectures.png into the
first results folder. Results of another cache than the newest comparison's are left out with a
note: their numbers do not compare.
"""

from __future__ import annotations

import argparse
import base64
import statistics
from pathlib import Path
from typing import NamedTuple

import jinja2

from common import arguments
from common.tables import print_columns
from figures.architectures import architectures
from lowrank_tokens.errors import percent_text
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import atomic_path, content_hash_fits, read_json
from model import ARCHITECTURES
from svd_baseline import gain_text
from training.checkpoint import load_model

TARGET, SHOWN_RANK = 0.16, "16"  # raw_error and rank of the closing lines, where they were measured


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument(
        "--results_dir",
        type=arguments.folder,
        nargs="+",
        default=["results"],
        metavar="DIR",
        help="folders that hold <arch>/, one for each way of training; the first gets the report",
    )
    return parser


class Run(NamedTuple):
    """One trained and compared network."""

    name: str  # architecture and way of training
    folder: Path
    comparison: dict  # svd_nn_comparison.json
    test: dict  # test_results.json
    history: list[dict]  # history.json, one entry an epoch; the first is the untrained network's


def read(path: Path) -> dict:
    """Read a JSON file that ends in its own hash; InputError where it was changed."""
    found = read_json(path, "make it again, or remove it")
    if not isinstance(found, dict) or not content_hash_fits(found):
        raise InputError(f"{path} is not as it was written: make it again, or remove it")
    return found


def read_runs(results_dirs: list[Path]) -> list[Run]:
    """Return the runs of the newest comparison's cache; note what is left out."""
    runs = []
    for folder in (d / arch for d in results_dirs for arch in ARCHITECTURES):
        if not (folder / "best_model.pt").exists():
            continue
        files = [folder / f"{name}.json" for name in ("svd_nn_comparison", "test_results")]
        if missing := [path for path in files if not path.exists()]:
            print(f"note: {folder} is left out: it has no {missing[0].name}")
            continue
        comparison, test = map(read, files)
        history = read_json(folder / "history.json", "resume the run with --resume last")
        runs.append(Run(run_name(comparison), folder, comparison, test, history))
    if not runs:
        where = f" --results_dir {results_dirs[0]}"
        raise InputError(
            f"{results_dirs[0]} has no network that is trained and compared: type python "
            f"train_real_data.py{where}, then python compare_svd_nn.py{where}"
        )
    newest = max(runs, key=lambda r: (r.folder / "svd_nn_comparison.json").stat().st_mtime)
    wanted = newest.comparison["cache_sha256"]
    for run in runs:
        if run.comparison["cache_sha256"] != wanted:
            print(f"note: {run.folder} is left out: another cache, {run.comparison['data']}")
    return [run for run in runs if run.comparison["cache_sha256"] == wanted]


def run_name(comparison: dict) -> str:
    """Return the architecture, and how it was trained where that is not the default."""
    name = comparison["arch"]
    if comparison["factors"] != "projected":
        name += f", {comparison['factors']}"
    return name + (f", for {comparison['trained_for']}" if comparison["trained_for"] else "")


def table(runs: list[Run]) -> list[list[str]]:
    """Return the cells of the table of runs; the first row is the header."""
    header = (
        "network|parameters|rank|rel_error|SVD|above SVD|best epoch|images/s|"
        f"rank {SHOWN_RANK}: task error below SVD (%)|box precision (SVD)"
    )
    rows = [header.split("|")]
    for name, folder, comparison, test, history in runs:
        rank = str(comparison["rank"])
        methods = comparison["ranks"][rank]
        model, _ = load_model(folder / "best_model.pt", "cpu")
        cells = [
            name,
            f"{sum(p.numel() for p in model.parameters()):,}",
            rank,
            f"{methods['network']['rel_error']['mean']:.5f}",
            f"{methods['svd']['rel_error']['mean']:.5f}",
            above_svd(methods),
            f"{test['best_epoch']} of {test['epochs']}",
            f"{statistics.median(epoch['samples_per_s'] for epoch in history[1:]):.1f}",
            gain_text(task_gain(comparison, SHOWN_RANK, "network")),
            box_precision(comparison),
        ]
        rows.append(cells)
    return rows


def above_svd(methods: dict) -> str:
    """Format by how much the network's error is above the SVD's; a dash where it is undefined."""
    excess = methods["network"]["excess_pct"]["mean"]
    return percent_text(excess) if excess is None or excess < 1 else f"{excess:.1f} %"


def box_precision(comparison: dict) -> str:
    """Format the box precision at SHOWN_RANK beside the SVD's; a dash where it is not measured."""
    of_rank = comparison["readers"]["ranks"].get(SHOWN_RANK, {})
    if "box_precision" not in of_rank.get("network", {}):
        return "–"
    network, svd = (of_rank[name]["box_precision"]["mean"] for name in ("network", "svd"))
    return f"{network:.3f} ({svd:.3f})"


def task_gain(comparison: dict, rank: str, method: str) -> dict | None:
    """Return by how much a method's task error is below the SVD's; None where not measured."""
    ranks = comparison["task"]["ranks"] if comparison["task"] else {}
    return ranks.get(rank, {}).get(method, {}).get("gain_pct")


# ---------------------------------------------------------------------------------- closing lines


def closing_lines(runs: list[Run], coded: dict) -> list[str]:
    """Return what was found, in at most five lines. coded: bytes.json, {} where there is none."""
    run = max(
        runs, key=lambda run: (bool(run.comparison["trained_for"]), bool(run.comparison["task"]))
    )
    comparison, ranks = run.comparison, run.comparison["ranks"]
    rank = SHOWN_RANK if SHOWN_RANK in ranks else max(ranks, key=int)
    lines = bytes_lines(coded)
    if gain := task_gain(comparison, rank, "network"):
        closed = task_gain(comparison, rank, "svd_in_metric")
        lines.append(
            f"task: at rank {rank} the error of the head {comparison['task']['head']} is "
            f"{gain_text(gain)} % below the SVD's by the network {run.name}, "
            + (f"{gain_text(closed)} % by the closed form" if closed else "no closed form measured")
        )
    plain = [r.comparison for r in runs if not r.comparison["trained_for"]]
    judged = next((c for c in plain if rank in c["ranks"]), comparison)["ranks"][rank]
    lines.append(
        f"reconstruction: at rank {rank} the network's error is {above_svd(judged)} above the "
        "SVD's, which no matrix of this rank can beat"
    )
    groups = f"{comparison['n_images']} test images of {comparison['n_groups']} groups"
    epochs = f"epoch {run.test['best_epoch']} of {run.test['epochs']} is the best (0: untrained)"
    return [*lines, f"training: {epochs}; measured on {groups}; {comparison['data']}"]


def bytes_lines(coded: dict) -> list[str]:
    """Return the size of a coded image, beside quantised SVD factors, and what a reader sees."""
    methods = coded.get("methods", {})
    if "coded" not in methods:
        return []

    def nearest(name: str) -> dict:
        return min(methods[name], key=lambda point: abs(point["raw_error"]["mean"] - TARGET))

    def size(point: dict) -> str:
        kilobytes, error = point["bytes"]["mean"] / 1e3, point["raw_error"]["mean"]
        return f"{kilobytes:.1f} kB an image at raw_error {error:.3f}"

    own, full, other = nearest("coded"), coded["full_tokens"], nearest("factors_quantised")
    line = f"bytes: {full['bytes']['mean'] / 1e3:.0f} kB of tokens become {size(own)}; "
    lines = [line + f"quantised SVD factors take {size(other)}"]
    seen = own.get("box_precision", {}).get("mean")
    if seen is not None:
        reader = "readers: a probe that looks for the answer's box has average precision"
        of_full = full["box_precision"]["mean"]
        lines.append(f"{reader} {seen:.3f} on those tokens, {of_full:.3f} on full ones")
    return lines


# ------------------------------------------------------------------------------------------- page


def embedded_figures(results_dirs: list[Path], runs: list[Run], left_out: set[str]) -> list[dict]:
    """Return path and PNG in base64 of the figures, the same of all networks side by side."""
    folders = dict.fromkeys([*results_dirs, *(run.folder for run in runs)])
    paths = [path for folder in folders for path in folder.glob("*.png")]
    shown = sorted((p for p in paths if p.name not in left_out), key=lambda path: path.name)
    return [{"path": p, "png": base64.b64encode(p.read_bytes()).decode()} for p in shown]


def of_this_cache(path: Path, cache_sha256: str) -> dict:
    """Return a JSON file's content; {}, with a note, where it was made from another cache."""
    found = read_json(path, "make it again, or remove it") if path.exists() else {}
    if found and found.get("cache_sha256") != cache_sha256:
        print(f"note: {path} is left out: it was made from another cache")
        return {}
    return found


def main(args: argparse.Namespace) -> None:
    results_dirs = [Path(folder) for folder in args.results_dir]
    runs = read_runs(results_dirs)
    comparison = runs[0].comparison
    footer = f"{comparison['data']}; {comparison['n_images']} test images"
    print(footer)
    rows = table(runs)
    print_columns(rows)
    first = results_dirs[0]
    first.mkdir(parents=True, exist_ok=True)  # it may hold the report alone
    architectures(first / "architectures.png", {run.name: run.comparison for run in runs}, footer)
    coded = of_this_cache(first / "bytes.json", comparison["cache_sha256"])
    benchmark = of_this_cache(first / "benchmark.json", comparison["cache_sha256"])
    lines = closing_lines(runs, coded)
    of_others = {"bytes.png": coded, "benchmark.png": benchmark}
    left_out = {name for name, found in of_others.items() if not found}
    figures = embedded_figures(results_dirs, runs, left_out)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    with atomic_path(first / "report.html") as temporary:
        text = page.render(title=footer, lines=lines, rows=rows, figures=figures)
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {first}/architectures.png and {first}/report.html: open that one in a browser")
    print("found:")
    for line in lines:
        print(f"  {line}")


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
