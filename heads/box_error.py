"""Where the error sits: at the tokens that the answer's box covers, and at all the others.

The error of a set S of tokens of one image is relative and of the set as a whole, as rel_error is
of the whole image:  (Σ_{t∈S} ‖x_t − x̂_t‖² / Σ_{t∈S} ‖x_t‖²)^½.

Legend: n images, T tokens on a grid (rows, columns), D features; a box is (x, y, w, h) in fractions
of the square that the encoder saw (`common.boxes.box_in_view`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_tokens.errors import summarise
from lowrank_tokens.grids import box_in_view, tokens_in_box
from qwenvl_dataloader import RealQwenVLDataset
from svd_baseline import interval_95

PARTS = ("inside", "outside")


def tokens_in_boxes(dataset: RealQwenVLDataset, rows: list[int]) -> list[Tensor]:
    """`tokens_in_box` of the answers' boxes of these rows of the cache, [T] bool each."""
    resize = dataset.manifest["resize"]
    boxes = [box_in_view(dataset.image_record(row), resize) for row in rows]
    grids = (dataset.grids[row] for row in rows)
    return [tokens_in_box(box, grid) for box, grid in zip(boxes, grids, strict=True)]


def part_errors(x: Tensor, a: Tensor, b: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """Error inside and outside of each image, "inside" and "outside" → [n] float64 on the CPU.

    x [n, T, D] normalised, a [n, T, r], b [n, r, D], inside [n, T] bool; NaN where a part is empty.
    """
    inside = inside.to(x.device)
    squared = torch.linalg.vector_norm((x - a @ b).double(), dim=-1).square()  # [n, T]
    energy = torch.linalg.vector_norm(x.double(), dim=-1).square()
    errors = {}
    for part, mask in zip(PARTS, (inside, ~inside), strict=True):
        of = (energy * mask).sum(-1).clamp_min(torch.finfo(energy.dtype).tiny)
        error = ((squared * mask).sum(-1) / of).sqrt()
        errors[part] = torch.where(mask.any(-1), error, torch.nan).cpu()
    return errors


def box_report(
    errors: dict[str, dict[str, Tensor]],
    inside: Tensor,
    groups: list[str],
    rank: int,
    left_out: int,
) -> dict:
    """What svd_nn_comparison.json says of the box.

    errors: "network" and "svd" → `part_errors` of n images, none of them NaN; inside: which of
    their tokens are in the box, bool of any shape; groups: of the n images; left_out: images
    without a box, or whose box covers no token or all.
    Differences are paired by image; the 95 % intervals are over groups, None below four.
    """
    report = {
        "rank": rank,
        "n_images": len(groups),
        "n_groups": len(set(groups)),
        "n_left_out": left_out,
    }
    if not groups:
        return report
    report["tokens_inside_pct"] = float(100 * inside.double().mean())
    for method, parts in errors.items():
        report[method] = {part: summarise(values) for part, values in parts.items()}
        apart = parts["inside"] - parts["outside"]
        report[method]["inside_minus_outside"] = _with_interval(apart, groups)
    report["network_minus_svd"] = {
        part: _with_interval(errors["network"][part] - errors["svd"][part], groups)
        for part in PARTS
    }
    return report


def _with_interval(values: Tensor, groups: list[str]) -> dict:
    return {"mean": float(values.mean()), "interval_95": interval_95(values, groups)}
