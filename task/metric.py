"""The task's own metric: how much a head's output moves when features of the tokens do.

    metric = load_metric("metrics/saliency.safetensors", dataset)
    a, b = metric_svd(x, 16, metric)                 # A·B of rank 16, in token space

M = mean over training images and tokens of g_t g_tᵀ, g the gradient of a random projection of the
head's output, taken relative to the output's norm, with respect to the normalised tokens. The
squared task error of X + E is then, on average and to first order, tr(E M Eᵀ): a factorisation of
X M^½ lowers it where the truncated SVD of X lowers ‖E‖_F.

Legend: b images, T tokens, D features, r rank. The files read here are made by
`experiments.estimate_metric`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import UserError
from common.files import save_tensors, sha256_file
from qwenvl_dataloader import Batch, RealQwenVLDataset, denormalise
from svd_baseline import Factors, gram_eigh

if TYPE_CHECKING:
    from model import LowRankFactorModel
    from task.heads import TaskHead

FORMAT = "1"
NEEDED = ("format", "head", "head_sha256", "cache", "shrinkage", "images", "probes")


class TaskMetric:
    """M [D, D] float64, positive definite, with mean diagonal 1, and what it was made from.

    head, head_sha256: whose output; scale: the mean diagonal before it was set to 1; info: the rest
    of what the file says; sha256: of the file, None for one that was not read from a file.
    """

    def __init__(self, matrix: Tensor, info: dict, sha256: str | None = None) -> None:
        self.matrix, self.info, self.sha256 = matrix, info, sha256

    @property
    def head(self) -> str:
        return self.info["head"]

    @property
    def scale(self) -> float:
        return self.info["scale"]

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.matrix)

    @cached_property
    def root(self) -> Tensor:
        """M^½ [D, D] float32, symmetric."""
        values, vectors = self._eigen
        return ((vectors * values.sqrt()) @ vectors.mT).float()

    @cached_property
    def inverse_root(self) -> Tensor:
        """M^-½ [D, D] float32, symmetric."""
        values, vectors = self._eigen
        return ((vectors / values.sqrt()) @ vectors.mT).float()

    def to(self, device: torch.device | str) -> TaskMetric:
        return TaskMetric(self.matrix.to(device), self.info, self.sha256)


# ------------------------------------------------------------------------------------ estimation


def probe_gradients(head: TaskHead, batch: Batch, probe: int, seed: int) -> Tensor:
    """g = ∂⟨v, y⟩/∂X / ‖y‖ [b, T, D] float32 for a Gaussian v an image: E g gᵀ = JᵀJ / ‖y‖².

    y the head's output of the raw tokens, J its derivative by the normalised X. v depends on the
    image's row, the number of the probe and the seed alone. One forward and one backward pass.
    """
    x = batch.x.clone().requires_grad_()
    y = head.outputs(denormalise(x, batch.mean, batch.std), batch.rows)
    v = torch.stack([_gaussian(y.shape[1:], (seed, row, probe)) for row in batch.rows.tolist()])
    norm = y.detach().flatten(1).norm(dim=-1).clamp_min(torch.finfo(y.dtype).tiny)
    (gradient,) = torch.autograd.grad(((y * v.to(y)).flatten(1).sum(-1) / norm).sum(), x)
    return gradient


def _gaussian(shape: torch.Size, key: tuple[int, ...]) -> Tensor:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def second_moment(
    head: TaskHead, batches: Iterable[Batch], probes: int, seed: int
) -> tuple[Tensor, int]:
    """Mean over images, probes and tokens of g_t g_tᵀ, [D, D] float64, and the number of images.

    Streaming: memory is that of one batch and of M. Raises UserError where it is not finite.
    """
    total, images, tokens = 0.0, 0, 0
    for batch in batches:
        for probe in range(probes):
            g = probe_gradients(head, batch, probe, seed).flatten(0, 1)
            total = total + (g.mT @ g).double()
            tokens += len(g)
        images += len(batch.x)
    moment = total / tokens
    if not moment.isfinite().all():
        raise UserError(f"the gradients of --head {head.name} are not finite: look at the cache")
    return moment, images


def shrunk(moment: Tensor, amount: float) -> Tensor:
    """(M + amount · mean diagonal · I) with mean diagonal 1, [D, D] float64: positive definite."""
    mean = moment.diagonal().mean()
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return (moment / mean + amount * eye) / (1 + amount)


# ----------------------------------------------------------------------------------- factorisation


def in_metric(
    factorise: Callable[[Tensor, int], Factors], metric: TaskMetric
) -> Callable[[Tensor, int], Factors]:
    """`factorise` of X M^½, mapped back: A as it is, B M^-½, so that A·B has rank ≤ r as before."""

    def mapped(x: Tensor, rank: int) -> Factors:
        a, b = factorise(x @ metric.root, rank)
        return a, b @ metric.inverse_root

    return mapped


class ModelInMetric:
    """A model whose factors are those of X M^½, mapped back; its attributes are the model's own."""

    def __init__(self, model: LowRankFactorModel, metric: TaskMetric) -> None:
        self.model, self._mapped = model, in_metric(model, metric)

    def __call__(self, x: Tensor, rank: int) -> Factors:
        return self._mapped(x, rank)

    def __getattr__(self, name: str):
        return getattr(self.model, name)


def factors_in(metric: TaskMetric, norm: dict[str, str | None] | None, what: str) -> bool:
    """Whether a network whose `norm` is this factors in `metric` by itself, mapped back already.

    So does one that was trained in this metric, or for the same head from the plain norm; one of
    the Frobenius norm (None) does not. what: the network, for the UserError where it was trained
    in another metric, on which this one cannot be laid.
    """
    if norm is None:
        return False
    trained = (norm["head"], norm["head_sha256"], norm["metric_sha256"] or metric.sha256)
    if trained != (metric.head, metric.info["head_sha256"], metric.sha256):
        raise UserError(
            f"{what} was trained in another metric (head {norm['head']}, file "
            f"{(norm['metric_sha256'] or 'none')[:12]}) than --metric (head {metric.head}, file "
            f"{(metric.sha256 or 'none')[:12]}): type that metric, or omit --metric"
        )
    return True


def network_in_metric(
    model: LowRankFactorModel, metric: TaskMetric
) -> LowRankFactorModel | ModelInMetric:
    """`model` factoring in `metric`: one that was trained in it as it is, another in `in_metric`.

    Raises UserError for a model of another metric (`factors_in`).
    """
    own = factors_in(metric, model.norm, f"the network {model.config['arch']}")
    return model if own else ModelInMetric(model, metric)


def metric_svd(x: Tensor, rank: int, metric: TaskMetric) -> Factors:
    """argmin over rank-r A·B of tr((X − A B) M (X − A B)ᵀ): A = U_r of X M^½, B = U_rᵀ X.

    The two roots cancel: U_rᵀ (X M^½) M^-½ = U_rᵀ X, so nothing is divided by small eigenvalues.
    Args: x [b, T, D]. Cost: that of `gram_eigh` and O(T D²) for X M^½.
    """
    u, _ = gram_eigh(x @ metric.root, rank)
    return u, u.mT @ x


def predicted_error(x: Tensor, metric: TaskMetric) -> Tensor:
    """First-order task error of `metric_svd` at the ranks 0 … T, [b, T + 1] float64, no head run.

    (scale · Σ_{i>r} σ_i(X M^½)²)^½, exact where JᵀJ / ‖y‖² is the mean metric for every token; a
    factor calibrated on validation images takes up what is left (`experiments.evaluate_task`).
    """
    z = (x @ metric.root).double()
    energy = torch.linalg.eigvalsh(z @ z.mT).clamp_min(0)  # smallest first
    tail = energy.cumsum(-1).flip(-1)  # tail[r] = Σ_{i>r} σ_i²
    return (metric.scale * torch.cat([tail, torch.zeros_like(tail[:, :1])], dim=-1)).sqrt()


# ------------------------------------------------------------------------------------------- files


def cache_hashes(dataset: RealQwenVLDataset) -> dict[str, str]:
    """What of a cache a metric depends on."""
    manifest = sha256_file(dataset.cache_dir / "manifest.json")
    return {"manifest_sha256": manifest, "split": dataset.split.hash}


def save_metric(path: Path, metric: TaskMetric) -> None:
    """Write M and what it was made from, atomically."""
    info = {"format": FORMAT} | {k: json.dumps(v) for k, v in metric.info.items()}
    save_tensors(path, {"metric": metric.matrix.cpu().contiguous()}, info)


def load_metric(path: str | Path, dataset: RealQwenVLDataset) -> TaskMetric:
    """The metric at `path`. Raises UserError where it is missing, damaged, or of another cache."""
    path = Path(path)
    remedy = "make it with experiments.estimate_metric"
    if not path.is_file():
        raise UserError(f"--metric {path} does not exist: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            matrix = file.get_tensor("metric")
    except (SafetensorError, OSError) as error:
        raise UserError(f"--metric {path} is damaged ({error}): {remedy}") from None
    if missing := [key for key in NEEDED if key not in stored]:
        raise UserError(f"--metric {path} lacks {', '.join(missing)}: {remedy}")
    info = {k: json.loads(v) for k, v in stored.items() if k != "format"}
    for key, value in cache_hashes(dataset).items():
        if info["cache"][key] != value:
            raise UserError(
                f"--metric {path} was made from another cache than {dataset.cache_dir} ({key} "
                f"differs): {remedy} --cache_dir {dataset.cache_dir}"
            )
    d = dataset.feature_dim
    if stored["format"] != FORMAT or matrix.shape != (d, d) or not matrix.isfinite().all():
        raise UserError(f"--metric {path} does not hold a finite {d} × {d} matrix: {remedy}")
    return TaskMetric(matrix, info, sha256_file(path))


def check_head(metric: TaskMetric, head: TaskHead) -> None:
    """Refuse a metric of another head, or of other weights of the same."""
    if (metric.head, metric.info["head_sha256"]) != (head.name, head.sha256):
        same = "other weights of " if metric.head == head.name else ""
        raise UserError(
            f"the metric is that of {same}the head {metric.head}, not of --head {head.name}: "
            f"make it with experiments.estimate_metric --head {head.name}"
        )
