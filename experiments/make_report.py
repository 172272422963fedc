"""Make a page of each run and one of all runs, and set the architectures side by side.

    python -m experiments.make_report --results_dir results --log_dir log

Writes results/<arch>/report.html of every run and results/index.html: whole in themselves, any
browser shows them, without a network. The latter opens with what was found in at most five lines,
which are printed too, and with its best figure. Also results/overview.png and overview.json of all
architectures that are trained and compared on the same test images, at every rank that they were
compared at.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from pathlib import Path

from common import arguments
from common.tables import print_columns
from experiments import report_page
from experiments.findings import findings
from figures.overview import overview
from lowrank_tokens.errors import percent_text
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import atomic_path, content_hash_fits, read_json, write_json
from model import ARCHITECTURES
from training.checkpoint import load_checkpoint

MADE_BY = {  # what of an architecture is read, and the script that writes it
    "history.json": "train_real_data.py",
    "test_results.json": "train_real_data.py",
    "svd_nn_comparison.json": "compare_svd_nn.py",
}


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    where = parser.flags("files")
    where("--results_dir", help="where the folders <arch>/ are")
    where("--log_dir")
    return parser


def main(args: argparse.Namespace) -> None:
    results_dir = Path(args.results_dir)
    folders = [f for arch in ARCHITECTURES if report_page.has_results(f := results_dir / arch)]
    if not folders:
        raise InputError(
            f"{results_dir} has no architecture that is trained: type python train_real_data.py "
            f"--results_dir {results_dir}, then python compare_svd_nn.py --results_dir "
            f"{results_dir}"
        )
    found = {folder.name: files for folder in folders if (files := read_results(folder))}
    found = of_newest_data(found, results_dir)
    rank = common_rank([comparison for _, _, comparison in found.values()])
    rows = [report_row(arch, *files, rank) for arch, files in found.items()]
    pages = {f / "report.html": report_page.run_page(f, Path(args.log_dir)) for f in folders}
    written = "report.html of each run"
    if rows:
        write_overview(results_dir, rows, found[rows[0]["arch"]][2])
        written += ", overview.png, overview.json"
    # what does not compare with the newest data is not found on it either
    found_by = [folder for folder in folders if folder.name in found] or folders
    lines = findings(results_dir, found_by)
    pages[results_dir / "index.html"] = report_page.index_page(results_dir, folders, rows, lines)
    for path, text in pages.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"wrote {written} and {results_dir}/index.html: open that one in a browser")
    if lines:
        print("found:")
    for line in lines:
        print(f"  {line}")


def write_overview(results_dir: Path, rows: list[dict], comparison: dict) -> None:
    """Table, overview.json and overview.png. comparison: one of those that `rows` are of."""
    footer = f"{comparison['data']}; {comparison['n_images']} test images"
    print(footer)
    print_table(rows)
    write_json(
        results_dir / "overview.json",
        {key: comparison[key] for key in ("data", "split", "n_images")} | {"architectures": rows},
    )
    overview(results_dir / "overview.png", rows, footer)


def read_results(folder: Path) -> tuple[list, dict, dict] | None:
    """An architecture's history, test numbers and comparison; None, with a note, where one is
    missing.

    Also None where the comparison was made at another rank than the trained one, since the SVD's
    error at the trained rank is then not in it. Raises InputError where a file is damaged.
    """
    arch = folder.name
    for name, script in MADE_BY.items():
        if not (folder / name).exists():
            missing = f"no {folder / name} (python {script} --arch {arch})"
            print(f"note: {arch} is not in the overview: {missing}")
            return None
    flags = f"--arch {arch}{where(folder)}"
    again = {name: f"run python {script} {flags} again" for name, script in MADE_BY.items()}
    history, test, comparison = (read_json(folder / name, again[name]) for name in MADE_BY)
    # a flipped digit is no result
    for name, found in (("test_results.json", test), ("svd_nn_comparison.json", comparison)):
        if not isinstance(found, dict) or not content_hash_fits(found):
            raise InputError(f"{folder / name} is not as it was written: {again[name]}")
    last = folder / "last_model.pt"
    if last.exists() and load_checkpoint(last)["progress"]["history"] != history:
        raise InputError(
            f"{folder}/history.json is not that of last_model.pt: go on with python "
            f"train_real_data.py {flags} --resume last"
        )
    if comparison["rank"] != test["effective_rank"]:
        ranks = f"compared at rank {comparison['rank']}, trained to rank {test['effective_rank']}"
        print(f"note: {arch} is not in the overview: {ranks} (python compare_svd_nn.py {flags})")
        return None
    return history, test, comparison


def where(folder: Path) -> str:
    """The flag that names the results of an architecture's `folder`; "" for the default."""
    results = str(folder.parent)
    return "" if results == "results" else f" --results_dir {shlex.quote(results)}"


def of_newest_data(found: dict[str, tuple], results_dir: Path) -> dict[str, tuple]:
    """Those of `found` on the data of the newest comparison: errors on others do not compare."""

    def data(arch: str) -> tuple[str, int]:
        comparison = found[arch][2]
        return comparison["data"], comparison["n_images"]

    if not found:
        return {}
    newest = max(found, key=lambda a: (results_dir / a / "svd_nn_comparison.json").stat().st_mtime)
    for arch in found:
        if data(arch) != data(newest):
            print(f"note: {arch} is not in the overview: other data than {newest}, {data(arch)[0]}")
    return {arch: files for arch, files in found.items() if data(arch) == data(newest)}


def common_rank(comparisons: list[dict]) -> int | None:
    """The largest rank that all were compared at: excesses at different ranks do not compare."""
    common = set.intersection(*(set(c["ranks"]) for c in comparisons)) if comparisons else ()
    return max(map(int, common), default=None)


def report_row(
    arch: str, history: list[dict], test: dict, comparison: dict, rank: int | None = None
) -> dict:
    """What table, figure and overview.json say of one architecture, at `rank` (None: its own);
    excess in per cent."""
    rank = rank or comparison["rank"]
    methods = comparison["ranks"][str(rank)]
    excess = methods["network"]["excess_pct"]
    speeds = [record["samples_per_s"] for record in history if "samples_per_s" in record]
    return {
        "arch": arch,
        "factors": comparison["factors"],
        "effective_rank": comparison["rank"],
        "rank": rank,
        "rel_error": methods["network"]["rel_error"]["mean"],
        "optimum": methods["svd"]["rel_error"]["mean"],
        "excess_mean": excess["mean"],
        "excess_p90": excess["p90"],
        "samples_per_s": statistics.median(speeds),
        "best_epoch": test["best_epoch"],
        "epochs": history[-1]["epoch"],
        "ranks": {r: rank_entry(comparison, r) for r in comparison["ranks"]},
    }


def rank_entry(comparison: dict, rank: str) -> dict[str, float | None]:
    """What the overview draws of one architecture at one rank; per cent, None: not measured."""
    methods = comparison["ranks"][rank]
    task = ((comparison.get("task") or {}).get("ranks") or {}).get(rank, {})
    return {
        "excess_mean": methods["network"]["excess_pct"]["mean"],
        "random_sketch_mean": methods.get("random_sketch", {}).get("excess_pct", {}).get("mean"),
        "task_gain_pct": task["network"]["gain_pct"]["mean"] if task else None,
    }


def print_table(rows: list[dict]) -> None:
    header = "architecture|factors|rank|rel_error|SVD|excess mean|p90|images/s|best epoch"
    cells = [header.split("|")]
    for row in rows:
        cells.append([row["arch"], row["factors"], row["rank"]])
        cells[-1] += [f"{row[key]:.5f}" for key in ("rel_error", "optimum")]
        cells[-1] += [percent_text(row[key]) for key in ("excess_mean", "excess_p90")]
        cells[-1] += [f"{row['samples_per_s']:.2f}", f"{row['best_epoch']} of {row['epochs']}"]
    print_columns(cells)


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
