"""Reference factorisations X ≈ A·B, and every metric by which anything here is judged.

Shapes: X [..., T, D] normalised tokens, A [..., T, r], B [..., r, D], σ [..., min(T, D)] float64.
Every reference returns (A, B) with A·B of rank ≤ r, float32, whatever it computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import torch
from scipy.special import stdtrit  # scipy.stats.t.ppf, without its second of import
from torch import Tensor

from lowrank_tokens.errors import image_metrics
from lowrank_tokens.linalg import Factors, gaussian, refine, start_shifts
from qwenvl_dataloader import Batch

MOMENT_MAX_IMAGES = 1000


def evaluate(factorise: Callable[[Tensor], Factors], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Call `evaluate_batches` for a method that needs no grid: `factorise(x)`."""
    return evaluate_batches(lambda batch: factorise(batch.x), batches)


@torch.inference_mode()
def evaluate_batches(
    factorise: Callable[[Batch], Factors], batches: Iterable[Batch], rank: int | None = None
) -> dict[str, Tensor]:
    """Return `image_metrics` of `factorise(batch)` over all batches: each [n] on the CPU.

    Without any batch the dict is empty.
    """
    parts = [
        image_metrics(batch.x, *factorise(batch), batch.singular_values, rank) for batch in batches
    ]
    names = parts[0] if parts else ()
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in names}


def report_ranks(rank: int) -> list[int]:
    """Return the ranks that tables and figures show: 8 to 128 below `rank`, and `rank` itself."""
    return [r for r in (8, 16, 32, 64, 128) if r < rank] + [rank]


# -------------------------------------------------------------------------------------- intervals

FEWEST_GROUPS = 4  # below that a t interval is wider than what it is of, and is not given


def interval_95(values: Tensor, groups: list[str]) -> list[float] | None:
    """Return an approximate 95 % interval of the mean of `values` [n]: Student's t over groups.

    Crops of one photograph are not independent: what scatters is a group's mean. Groups of one size
    give the t interval of their means; of differing sizes each counts by its images, so that the
    interval lies about the mean over images. NaN values are left out; None below 4 groups.
    """
    known = ~values.isnan()
    values = values[known].double().cpu()
    spread = _half_width(values - values.mean(), _known(groups, known))
    mean = float(values.mean())
    return None if spread is None else [mean - spread, mean + spread]


def gain(own: Tensor, base: Tensor, groups: list[str]) -> dict[str, float | list[float] | None]:
    """Return by how many per cent the mean of `own` [n] is below that of `base` [n].

    Returns: {"mean": 100 (1 − mean own / mean base), "interval_95"}. The interval is that of the
    logarithm of the ratio, where each group counts by own / mean own − base / mean base (the ratio
    to first order, both means uncertain), mapped back to per cent. NaN in one of both is left out;
    no interval below 4 groups or where a mean is not above 0, and no mean where that of base is 0.
    """
    known = ~(own.isnan() | base.isnan())
    own, base = (v[known].double().cpu() for v in (own, base))
    means = float(own.mean()), float(base.mean())
    found = {"mean": 100 * (1 - means[0] / means[1]) if means[1] else None, "interval_95": None}
    if min(means) > 0:
        spread = _half_width(own / means[0] - base / means[1], _known(groups, known))
        if spread is not None:
            ratio = means[0] / means[1]
            ends = (ratio * math.exp(spread), ratio * math.exp(-spread))
            found["interval_95"] = [100 * (1 - end) for end in ends]
    return found


def gain_text(gain: dict | None) -> str:
    """Format a `gain` in per cent for tables: mean [interval]; a dash where there is none."""
    if gain is None or gain["mean"] is None:
        return "-"
    # + 0.0: as little below as above is 0.0 and not -0.0
    mean, *ends = (f"{round(v, 1) + 0.0:.1f}" for v in (gain["mean"], *(gain["interval_95"] or [])))
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def _half_width(deviations: Tensor, groups: list[str]) -> float | None:
    """Return t · standard error of a mean over n images, from deviations [n] that add up to 0."""
    names, index = np.unique(groups, return_inverse=True)
    count = len(names)
    if count < FEWEST_GROUPS:
        return None
    sums = np.bincount(index, deviations.numpy(), minlength=count)
    error = math.sqrt(count / (count - 1) * float(np.square(sums).sum())) / len(groups)
    return float(stdtrit(count - 1, 0.975)) * error


def _known(groups: list[str], known: Tensor) -> list[str]:
    return [group for group, is_known in zip(groups, known.tolist(), strict=True) if is_known]


# ------------------------------------------------------------------------------------- references


def truncated_svd(x: Tensor, rank: int, driver: str | None = None) -> Factors:
    """Return the optimum by torch.linalg.svd: A = U_r, B = diag(σ_r) V_rᵀ. O(T D min(T, D))."""
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False, driver=driver)
    return u[..., :rank], sigma[..., :rank, None] * vh[..., :rank, :]


def randomized_svd(x: Tensor, rank: int, seed: int = 0) -> Factors:
    """Call torch.svd_lowrank with two power iterations and 10 extra columns (Halko et al. 2011)."""
    q = min(rank + 10, *x.shape[-2:])
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        u, sigma, v = torch.svd_lowrank(x, q=q, niter=2)
    return u[..., :rank], sigma[..., :rank, None] * v.mT[..., :rank, :]


def random_sketch(x: Tensor, rank: int, steps: int, columns: int) -> Factors:
    """Refine the textbook's random sketch X Xᵀ Ω as the network refines its own.

    Ω is Gaussian [T, c], c = `columns` ≥ rank, and `steps` is K (Halko et al. 2011, sec. 4.5): what
    is left of the network when nothing is learned.
    """
    rank, columns = (min(count, *x.shape[-2:]) for count in (rank, columns))
    omega, shifts = _nothing_learned(x.shape[-2], steps, columns, x.device)
    sketch = x @ (x.mT @ omega)  # [b, T, c]
    u = refine(sketch, x, shifts, rank, ordered=False).u.to(x.dtype)
    return u, u.mT @ x


@cache
def _nothing_learned(
    tokens: int, steps: int, columns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return Ω and shifts in place of a network's weights: as those, made before timing."""
    return gaussian(tokens, columns).to(device), start_shifts(steps).to(device)


def second_moment(images: Iterable[Tensor]) -> Tensor:
    """Sum XᵀX over training images, not centred: [D, D] float64 on their device.

    images: batches x [b, T, D], of which the first 1000 images are used.
    """
    moment, seen = 0.0, 0
    for x in images:
        tokens = x[: MOMENT_MAX_IMAGES - seen].flatten(0, 1)
        moment = moment + (tokens.mT @ tokens).double()
        seen += len(x)
        if seen >= MOMENT_MAX_IMAGES:
            break
    return moment


def fit_pca(images: Iterable[Tensor]) -> Tensor:
    """Fit principal axes of training tokens, shared by all images: [D, D] float32, largest first.

    Not centred, so that X V_r V_rᵀ has rank ≤ r.
    """
    return torch.linalg.eigh(second_moment(images))[1].flip(-1).float()


def pca(x: Tensor, rank: int, axes: Tensor) -> Factors:
    """Project on one basis for all images: A = X V_r, B = V_rᵀ, V the axes of `fit_pca`."""
    basis = axes[:, :rank]
    return x @ basis, basis.mT.expand(*x.shape[:-2], rank, x.shape[-1])


def principal_coordinates(x: Tensor, others: Iterable[Tensor], count: int) -> list[Tensor]:
    """Return coordinates on the first principal components of X's tokens, of X and of `others`.

    x and others: [T, D]; of each [T, count] float64 on the CPU. Components and centre are X's alone
    (mean token removed), so that what an X_hat has lost of X is seen as flat, not rescaled.
    """
    x = x.double()
    centre = x.mean(0)
    axes = torch.linalg.svd(x - centre, full_matrices=False).Vh[:count].mT  # [D, count]
    return [((y.double() - centre) @ axes).cpu() for y in (x, *others)]
