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

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import check_keys, save_tensors, sha256_file
from lowrank_tokens.linalg import Factors, exact_factors, symmetric_power
from qwenvl_dataloader import Batch, RealQwenVLDataset

if TYPE_CHECKING:
    from heads.task_head import TaskHead
    from model import LowRankFactorModel

FORMAT = "1"
CONTENT_HASH = "content_sha256"
ASYMMETRY = 1e-5  # of the largest entry: sums of float32 products differ by their order
INFO = {  # what a metric's file says at least
    **{"head": str, "head_sha256": str, "cache": dict, "shrinkage": (int, float)},
    **{"scale": (int, float), "images": int, "probes": int},
}


class TaskMetric:
    """M [D, D] float64, positive definite, with mean diagonal 1, and what it was made from.

    head, head_sha256: whose output; scale: the mean diagonal before it was set to 1; info: the rest
    of what the file says; sha256: of the file, None for one that was not read from a file.
    """

    def __init__(self, matrix: Tensor, info: dict, sha256: str | None = None) -> None:
        self.matrix, self.info, self.sha256 = matrix, info, sha256
        self.head, self.scale = info.get("head"), info.get("scale")

    @cached_property
    def root(self) -> Tensor:
        """M^½ [D, D] float32, symmetric."""
        return symmetric_power(self.matrix, 0.5).float()

    @cached_property
    def inverse_root(self) -> Tensor:
        """M^-½ [D, D] float32, symmetric."""
        return symmetric_power(self.matrix, -0.5).float()

    def to(self, device: torch.device | str) -> TaskMetric:
        return TaskMetric(self.matrix.to(device), self.info, self.sha256)


# ------------------------------------------------------------------------------------ estimation


def probe_gradients(head: TaskHead, batch: Batch, probe: int, seed: int) -> Tensor:
    """Return g = ∂⟨v, y⟩/∂X / ‖y‖ [b, T, D] float32, v Gaussian an image: E g gᵀ = JᵀJ / ‖y‖².

    y is the head's output of the raw tokens, as its error compares it, J its derivative by the
    normalised X. v depends on the image's row and own output's shape, the number of the probe and
    the seed alone, and is 0 where a batch pads the output. One forward and one backward pass.
    """
    x = batch.x.clone().requires_grad_()
    y = head.compared(head.of_batch(batch, x))
    v = torch.zeros(y.shape)
    shapes = head.own_shapes(y, batch.rows)
    for padded, row, shape in zip(v, batch.rows.tolist(), shapes, strict=True):
        own = tuple(slice(size) for size in shape)
        padded[own] = _gaussian(shape, (seed, row, probe))
    norm = y.detach().flatten(1).norm(dim=-1).clamp_min(torch.finfo(y.dtype).tiny)
    (gradient,) = torch.autograd.grad(((y * v.to(y)).flatten(1).sum(-1) / norm).sum(), x)
    return gradient


def _gaussian(shape: torch.Size, key: tuple[int, ...]) -> Tensor:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class MomentSum:
    """Σ g_t g_tᵀ [D, D] float64 over the tokens of `images` images so far, `tokens` g in all.

    Streaming: memory is that of one batch and of M.
    """

    total: Tensor | float = 0.0
    images: int = 0
    tokens: int = 0

    def add(self, head: TaskHead, batch: Batch, probes: int, seed: int) -> None:
        for probe in range(probes):
            g = probe_gradients(head, batch, probe, seed).flatten(0, 1)
            product = (g.mT @ g).double()
            self.total = product + torch.as_tensor(self.total).to(product)
            self.tokens += len(g)
        self.images += len(batch.x)

    def mean(self, head: TaskHead) -> Tensor:
        """[D, D] float64. Raises InputError where it is not finite."""
        moment = self.total / self.tokens
        if not moment.isfinite().all():
            raise InputError(
                f"the gradients of --head {head.name} are not finite: look at the cache"
            )
        return moment


def shrunk(moment: Tensor, amount: float) -> Tensor:
    """Return M + amount · mean diagonal · I, scaled to mean diagonal 1: [D, D] float64."""
    mean = moment.diagonal().mean()
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return (moment / mean + amount * eye) / (1 + amount)


# ----------------------------------------------------------------------------------- factorisation


class InMetric:
    """A factorisation of X M^½, mapped back: A as it is and B M^-½, so that A·B has rank ≤ r."""

    def __init__(self, factorise: Callable[[Tensor, int], Factors], metric: TaskMetric) -> None:
        self.factorise, self.metric = factorise, metric

    def __call__(self, x: Tensor, rank: int, **options) -> Factors:
        a, b = self.factorise(x @ self.metric.root, rank, **options)
        return a, b @ self.metric.inverse_root


class NetworkInMetric(InMetric):
    """A network that factors X M^½; it offers the network's configuration and rank."""

    def __init__(self, model: LowRankFactorModel, metric: TaskMetric) -> None:
        super().__init__(model, metric)
        self.config = model.config

    def current_effective_rank(self) -> int:
        return self.factorise.current_effective_rank()


def factors_in(metric: TaskMetric, norm: dict[str, str | None] | None, what: str) -> bool:
    """Return whether a network whose `norm` is this factors in `metric` by itself, mapped back.

    So does one that was trained in this metric, or for the same head from the plain norm; one of
    the Frobenius norm (None) does not. what: the network, for the InputError where it was trained
    in another metric, on which this one cannot be laid.
    """
    if norm is None:
        return False
    trained = (norm["head"], norm["head_sha256"], norm["metric_sha256"] or metric.sha256)
    if trained != (metric.head, metric.info["head_sha256"], metric.sha256):
        raise InputError(
            f"{what} was trained in another metric (head {norm['head']}, file "
            f"{(norm['metric_sha256'] or 'none')[:12]}) than --metric (head {metric.head}, file "
            f"{(metric.sha256 or 'none')[:12]}): type that metric, or omit --metric"
        )
    return True


def network_in_metric(
    model: LowRankFactorModel, metric: TaskMetric
) -> LowRankFactorModel | NetworkInMetric:
    """Return what factors in `metric`: the network itself where it was trained in it.

    Raises InputError for a model of another metric (`factors_in`).
    """
    own = factors_in(metric, model.norm, f"the network {model.config.arch}")
    return model if own else NetworkInMetric(model, metric)


def metric_svd(x: Tensor, rank: int, metric: TaskMetric) -> Factors:
    """Return argmin over rank-r A·B of tr((X − A B) M (X − A B)ᵀ): A = U_r of X M^½, B = U_rᵀ X.

    The two roots cancel: U_rᵀ (X M^½) M^-½ = U_rᵀ X, so nothing is divided by small eigenvalues.
    Args: x [b, T, D]. Cost: that of `exact_factors` and O(T D²) for X M^½.
    """
    u, _ = exact_factors(x @ metric.root, rank)
    return u, u.mT @ x


# ------------------------------------------------------------------------------------------- files


def cache_hashes(dataset: RealQwenVLDataset) -> dict[str, str]:
    """Return the hashes of what a metric depends on in a cache: its features and its split.

    Singular values are left out: their last bits depend on how many threads computed them.
    """
    return {"content_sha256": dataset.content_sha256, "split": dataset.split.hash}


def content_sha256(matrix: Tensor, info: dict[str, str]) -> str:
    """Hash M's bytes and everything that its file says of it, but for the hash itself."""
    digest = hashlib.sha256(matrix.contiguous().numpy().tobytes())
    said = {key: value for key, value in info.items() if key != CONTENT_HASH}
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


def save_metric(path: Path, metric: TaskMetric) -> None:
    """Write M and what it was made from, with a hash of both, atomically."""
    matrix = metric.matrix.cpu().contiguous()
    info = {"format": FORMAT} | {k: json.dumps(v) for k, v in metric.info.items()}
    info[CONTENT_HASH] = content_sha256(matrix, info)
    save_tensors(path, {"metric": matrix}, info)


def load_metric(path: str | Path, dataset: RealQwenVLDataset) -> TaskMetric:
    """Read the metric at `path`.

    Raises InputError where it is missing, damaged or of another cache. Checks the content hash,
    what the file says, M's shape, symmetry and positive definiteness.
    """
    path, what = Path(path), f"--metric {path}"
    remedy = "make it with experiments.estimate_metric"
    if not path.is_file():
        raise InputError(f"{what} does not exist: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            matrix = file.get_tensor("metric")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{what} is damaged ({error}): {remedy}") from None
    info = _read_info(what, stored, matrix, remedy)
    for key, value in cache_hashes(dataset).items():
        if info["cache"].get(key) != value:
            raise InputError(
                f"{what} was made from another cache than {dataset.cache_dir} ({key} "
                f"differs): {remedy} --cache_dir {dataset.cache_dir}"
            )
    _check_matrix(what, matrix, dataset.feature_dim, remedy)
    return TaskMetric(matrix, info, sha256_file(path))


def _read_info(what: str, stored: dict[str, str], matrix: Tensor, remedy: str) -> dict:
    """Return what the file's header says of M, checked; `what` names the file."""
    if stored.get("format") != FORMAT:
        raise InputError(f"{what} is no metric of format {FORMAT}: {remedy}")
    if stored.get(CONTENT_HASH) != content_sha256(matrix, stored):
        raise InputError(f"{what} is damaged (its content hash is another): {remedy}")
    try:
        info = {k: json.loads(v) for k, v in stored.items() if k not in ("format", CONTENT_HASH)}
    except ValueError as error:
        raise InputError(f"{what} is damaged ({error}): {remedy}") from None
    check_keys(what, info, INFO, remedy)
    if not (math.isfinite(info["scale"]) and info["scale"] >= 0):
        raise InputError(f"{what} is damaged (scale is {info['scale']}): {remedy}")
    return info


def _check_matrix(what: str, matrix: Tensor, d: int, remedy: str) -> None:
    """Refuse what is not a symmetric positive definite float64 [D, D]."""
    if matrix.dtype != torch.float64 or matrix.shape != (d, d) or not matrix.isfinite().all():
        raise InputError(f"{what} does not hold a finite {d} × {d} matrix of float64: {remedy}")
    if (matrix - matrix.mT).abs().max() > ASYMMETRY * matrix.abs().max():
        raise InputError(f"{what} is damaged (its matrix is not symmetric): {remedy}")
    if torch.linalg.cholesky_ex(matrix).info != 0:
        raise InputError(f"{what} is damaged (its matrix is not positive definite): {remedy}")


def check_head(metric: TaskMetric, head: TaskHead) -> None:
    """Refuse a metric of another head, or of other weights of the same."""
    if (metric.head, metric.info["head_sha256"]) != (head.name, head.sha256):
        same = "other weights of " if metric.head == head.name else ""
        raise InputError(
            f"the metric is that of {same}the head {metric.head}, not of --head {head.name}: "
            f"make it with experiments.estimate_metric --head {head.name}"
        )
