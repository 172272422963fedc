"""What the runs of a results folder found, in at most five lines; every number is of its files.

lines = findings(results_dir, folders)      # folders: results_dir/<arch>, the newest data's
"""

from __future__ import annotations

from pathlib import Path

from lowrank_tokens.errors import percent_text
from lowrank_tokens.files import read_json
from svd_baseline import gain_text

AGAIN = "make it again, or remove it"
RAW_TARGETS, TASK_TARGETS = ("0.16", "0.24", "0.1", "0.05"), ("0.05", "0.1", "0.03")
SHOWN_RANK = "16"  # of the comparison at equal rank, where it was compared at


def findings(results_dir: Path, folders: list[Path]) -> list[str]:
    """Bytes at equal error, errors at equal rank in both norms, training, and what it is of."""
    found = [(folder, read_if_there(folder / "svd_nn_comparison.json")) for folder in folders]
    compared = [(folder, comparison) for folder, comparison in found if comparison]
    # a run for a task first: its comparison says something of both norms
    compared.sort(key=lambda pair: not pair[1].get("task"))
    folder, comparison = compared[0] if compared else (None, {})
    coded = read_if_there(results_dir / "bytes.json")
    lines = [_bytes_line(coded, comparison), _task_bytes_line(coded)]
    if comparison:
        lines += [task_line(folder, comparison), _frobenius_line(folder, comparison)]
    lines += [_training_line(folder) if folder else "", _data_line(comparison, coded)]
    lines = [line for line in lines if line]
    if len(lines) > 5:
        lines.remove(_task_bytes_line(coded))
    return lines


def best_figure(results_dir: Path, folders: list[Path]) -> tuple[Path, str] | None:
    """The figure that a page of all runs opens with, and its caption; None where there is none."""
    if (path := results_dir / "bytes.png").exists():
        return path, "Bytes of an image against the error of its tokens, every method."
    for folder in folders:
        path = folder / "train_val_loss_comparison.png"
        if path.exists() and _task_history(folder):
            return path, f"{folder.name} trained for its task: validation task error over epochs."
    return None


def kilobytes(number: float) -> str:
    """Bytes in kB, three digits."""
    return f"{number / 1e3:#.3g}".removesuffix(".") + " kB"


def read_if_there(path: Path) -> dict | list:
    """A JSON file, {} where there is none. Raises InputError where it is damaged."""
    return read_json(path, AGAIN) if path.exists() else {}


def _at(coded: dict, key: str, targets: tuple[str, ...]) -> tuple[str, dict[str, float]] | None:
    """The first target that coded factors reach, and method → bytes an image there."""
    for target in targets:
        methods = coded.get("tables", {}).get(key, {}).get(target, {})
        sizes = {name: entry["alone"] for name, entry in methods.items() if entry["alone"]}
        if "coded" in sizes:
            return target, sizes
    return None


def _bytes_line(coded: dict, comparison: dict) -> str:
    found = _at(coded, "raw_error", RAW_TARGETS)
    if not found:
        return ""
    target, sizes = found
    line = f"{kilobytes(sizes['coded'])} an image at raw_error {target}"
    if "num_tokens" in comparison:
        full = 2 * comparison["num_tokens"] * comparison["feature_dim"]
        line = (
            f"{kilobytes(full)} of tokens in bf16 → {line}, {full / sizes['coded']:.0f} times fewer"
        )
    if "factors_int8" in sizes:
        line += f"; SVD factors in int8 take {kilobytes(sizes['factors_int8'])}"
    shared = (coded.get("codec") or {}).get("bytes")
    if shared:
        line += f"; the codec file, {shared / 1e6:.1f} MB, is shared by all images"
    return line


def _task_bytes_line(coded: dict) -> str:
    found = _at(coded, "task_error", TASK_TARGETS)
    if not found or "factors_int8" not in found[1]:
        return ""
    target, sizes = found
    own, other = (kilobytes(sizes[name]) for name in ("coded", "factors_int8"))
    line = f"at task error {target} of the head {coded['head']}: coded factors {own} an image, "
    return line + f"SVD factors in int8 {other}"


def _rank(ranks: dict) -> str:
    return SHOWN_RANK if SHOWN_RANK in ranks else max(ranks, key=int)


def task_line(folder: Path, comparison: dict) -> str:
    """The gain of the trained network, and of the closed form where it was measured."""
    task = comparison.get("task")
    if not task:
        return ""
    rank = _rank(task["ranks"])
    methods = task["ranks"][rank]
    closed = methods.get("svd_in_metric")
    if closed is None:  # measured by experiments.evaluate_task, it may be
        sweep = read_if_there(folder / "task_sweep.json")
        same = ("n_images" in sweep) and sweep["n_images"] == comparison["n_images"]
        if same and sweep.get("head_sha256") == task["head_sha256"]:
            closed = sweep["methods"].get("svd_in_metric", {}).get(rank)
    begun = ", begun at the closed form," if task.get("network_metric_sha256") else ""
    line = (
        f"at rank {rank} task error (head {task['head']}) below the SVD's: trained network{begun}"
    )
    line += f" {_gain(methods['network']['gain_pct'])}; closed-form metric "
    if closed:
        images = task.get("metric_images")
        return line + (f"(of {images} images) " if images else "") + _gain(closed["gain_pct"])
    return line + f"not measured (python -m experiments.estimate_metric --head {task['head']})"


def _gain(gain: dict) -> str:
    if gain["mean"] is None:
        return "undefined"
    mean, bracket, ends = gain_text(gain).partition(" [")
    return f"{mean} %{bracket}{ends}"


def _frobenius_line(folder: Path, comparison: dict) -> str:
    rank = _rank(comparison["ranks"])
    mean = comparison["ranks"][rank]["network"]["excess_pct"]["mean"]
    if mean is None:  # the SVD leaves nothing at this rank
        return ""
    above = percent_text(mean) if mean < 1 else f"{mean:.1f} %"
    interval = (comparison.get("network_excess_pct_95") or {}).get(rank)
    bounds = " [{:.3g}, {:.3g}]".format(*interval) if interval else ""
    line = f"at rank {rank} in the Frobenius norm the SVD wins, by theorem: rel_error of "
    return line + f"{folder.name} is {above}{bounds} above the SVD's"


def _task_history(folder: Path) -> list[dict]:
    history = read_if_there(folder / "history.json") or []
    return history if history and "val_task_error" in history[0] else []


def _training_line(folder: Path) -> str:
    test = read_if_there(folder / "test_results.json")
    if "best_epoch" not in test:
        return ""
    best, epochs = test["best_epoch"], test["epochs"]
    if history := _task_history(folder):
        errors = {record["epoch"]: record["val_task_error"] for record in history}
        if best in errors and best:
            less = 100 * (1 - errors[best] / errors[0])
            line = f"training: validation task error {errors[0]:.4f} untrained → "
            return line + f"{errors[best]:.4f} at epoch {best} of {epochs}, {less:.0f} % less"
    if best == 0:
        return f"training: none of {epochs} epochs is better than the untrained network"
    return f"training: epoch {best} of {epochs} is the best on validation images"


def _data_line(comparison: dict, coded: dict) -> str:
    """What the numbers are of."""
    parts = []
    for found, words in ((comparison, ""), (coded, " (bytes)")):
        if "n_groups" in found:
            images = f"{found['n_images']} test images of {found['n_groups']} groups"
            parts.append(images + words)
    data = comparison.get("data") or coded.get("data")
    if not parts:
        return ""
    return f"measured on {', '.join(parts)}; [ ]: approximate 95 % intervals over groups; {data}"
