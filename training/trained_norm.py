"""A network trained for a task: it learns in which norm X is to be factored, through the head.

The core is any `LowRankFactorModel` with projected factors; it factors Z = diag(w) X S instead of
X. S [D, D] starts as the task's metric (M^½ up to a rotation) and w as ones; both are learned, by
branches of the core's architecture, so that the norm is the image's own. Then A = diag(1/w) U and
B = Uᵀ diag(w) X, the exact coefficients in that norm; S needs no inverse. A·B is of rank ≤ r, in
token space.

Legend: b images, T tokens, D features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common import processes
from heads.metric import TaskMetric
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import NORM_FLOOR, Factors, exact_singular_values
from model import LossTerms, LowRankFactorModel, Resize, SVDLinear
from qwenvl_dataloader import Batch

if TYPE_CHECKING:
    from heads.task_head import TaskHead

TRAINED_RANKS = (4, 8, 16, 32)  # of the task's loss, one a step in turn
LOSS_FLOOR = 1e-8  # of squared relative errors: well above the rounding of a float32 head
GAP_FLOOR = 1e-3  # relative to the smallest kept eigenvalue: nearer ones count as this far apart


class _LeadingProjector(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        # non-finite weights are found in the loss, an eigensolver would raise instead
        values, vectors = torch.linalg.eigh(gram.nan_to_num())
        ctx.save_for_backward(values, vectors)
        ctx.mark_non_differentiable(values)
        ctx.rank = rank
        u = vectors[..., -rank:]
        return u @ u.mT, values

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        # P = Σ_{i≤r} u_i u_iᵀ:  dP = Σ_{i≤r<j} u_iᵀ dG u_j / (λ_i − λ_j) (u_i u_jᵀ + u_j u_iᵀ)
        values, vectors = ctx.saved_tensors
        kept, rest = vectors[..., -ctx.rank :], vectors[..., : -ctx.rank]
        smallest = values[..., -ctx.rank, None, None]
        gap = values[..., -ctx.rank :, None] - values[..., None, : -ctx.rank]
        gap = gap.maximum(GAP_FLOOR * smallest).clamp_min(torch.finfo(gap.dtype).tiny)
        half = kept @ ((kept.mT @ ((grad + grad.mT) / 2) @ rest) / gap) @ rest.mT
        return half + half.mT, None


def leading_projector(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U_r U_rᵀ [..., T, T] of the r leading eigenvectors of gram [..., T, T], with its
    gradient, and gram's eigenvalues [..., T], the least first, without one.

    The gradient needs no gap among the kept eigenvalues or among the others, only between the two;
    a smaller one than 1e-3 of the smallest kept eigenvalue counts as that. Cost O(T³).
    """
    return _LeadingProjector.apply(gram, rank)


class TaskWeighting(nn.Module):
    """x [b, T, D] → Z = diag(w) X S [b, T, D], and w [b, T, 1] > 0: each image's own norm.

    Two branches of the core's architecture read X from its two sides: token_net each token, for
    its weight w, and gain_net each feature's column [T], for the gain of that feature in this
    image. Gains and a mix of 32 columns of S are shared by all images. It starts as the metric
    itself, or (plain) as the plain norm, with w and all gains 1.
    """

    def __init__(self, core: LowRankFactorModel, plain: bool, columns: int = 32) -> None:
        super().__init__()
        features = core.config.input_dim
        # V, eigenvectors of M; None: the features as they are
        self.register_buffer("basis", None if plain else torch.eye(features))
        self.register_buffer("root", torch.ones(features))  # square roots of M's eigenvalues
        # [n] of the rotated features that token_net reads
        self.register_buffer("selected", core.selected.clone())
        self.token_net = core.make_branch(2 * len(self.selected), 1)
        self.gain_net = core.make_branch(core.config.num_tokens, 1)
        for branch in (self.token_net, self.gain_net):
            branch.zero_()
        self.log_gain = nn.Parameter(torch.zeros(features))
        self.mix_in = nn.Parameter(torch.randn(features, columns) / math.sqrt(features))
        self.mix_out = nn.Parameter(torch.zeros(columns, features))

    def start_from(self, metric: TaskMetric) -> None:
        """Make M's eigenvectors and eigenvalues the start of S; token_net reads the first ones."""
        values, vectors = torch.linalg.eigh(metric.matrix)
        self.basis = vectors.flip(-1).to(self.root).contiguous()
        self.root.copy_(values.flip(-1).sqrt())
        self.selected.copy_(torch.arange(len(self.selected)))

    def shared(self) -> list[nn.Parameter]:
        """Return the parameters shared by all images. They get the larger learning rate."""
        return [self.log_gain, self.mix_in, self.mix_out]

    def forward(self, x: Tensor, resize: Resize | None) -> tuple[Tensor, Tensor]:
        """Return Z [b, T, D] and w [b, T, 1]; resize: to the grid of x, None for the own one."""
        rotated = x if self.basis is None else x @ self.basis  #             [b, T, D]
        leading = rotated[..., self.selected]  #                             [b, T, n]
        # a token's weight depends on itself and on how it stands out from its image
        both = torch.cat([leading, leading - leading.mean(-2, keepdim=True)], dim=-1)
        w = self.token_net(both, 1).clamp(-3, 3).exp()  #                    [b, T, 1]
        # each feature's map over the image, at a mean square of 1
        size = rotated.square().mean(-2, keepdim=True).sqrt().clamp_min(NORM_FLOOR)
        own_gain = self.gain_net((rotated / size).mT, 1, resize).mT  #       [b, 1, D]
        gain = (self.log_gain + own_gain.clamp(-3, 3)).exp()
        z = rotated * (self.root * gain)  #                                  [b, T, D]
        return w * (z + z @ self.mix_in @ self.mix_out), w


class TaskFactorModel(nn.Module):
    """A `LowRankFactorModel` in a learned norm.

    It offers what scripts ask of a model: `config`, `norm`, `shifts`, `forward`, `loss_terms`,
    `rank_at`, `sketch_columns`, `current_effective_rank` and `start_from`.

    Args: core: with projected factors; task: {"head", "head_sha256", "metric_sha256"} of what it
    is trained for, kept in the checkpoint; metric_sha256 is None where it began at the plain norm.
    """

    def __init__(self, core: LowRankFactorModel, task: dict[str, str | None]) -> None:
        super().__init__()
        if core.config.factors != "projected":
            raise InputError(
                "--task_head and --metric need --factors projected: omit --factors direct"
            )
        self.core, self.config = core, core.config
        self.norm = task  # which head and metric it was made from: `metric.network_in_metric`
        self.weighting = TaskWeighting(core, plain=task.get("metric_sha256") is None)

    @property
    def shifts(self) -> Tensor:
        """s_k [K] in (0, 1)."""
        return self.core.shifts

    def rank_at(self, x: Tensor, rank: int | None = None) -> int:
        """Return the rank at which x [b, T, D] is factored."""
        return self.core.rank_at(x, rank)

    def sketch_columns(self, rank: int | None = None) -> int:
        """Return the columns of the sketch for a rank."""
        return self.core.sketch_columns(rank)

    def current_effective_rank(self) -> int:
        """Return the rank of A·B."""
        return self.core.current_effective_rank()

    def in_norm(self, x: Tensor, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
        """Return Z = diag(w) X S [b, T, D] of x on `grid`, by default the own, and w [b, T, 1]."""
        return self.weighting(x, self.core.resize_to(grid))

    def start_from(self, moment: Tensor) -> None:
        """Start from the second moment of training tokens in their norm, as the core does.

        token_net reads the features that the core selects where the norm began plain, and the
        leading directions of a metric.
        """
        self.core.start_from(moment)
        if self.norm.get("metric_sha256") is None:
            self.weighting.selected.copy_(self.core.selected)

    def forward(
        self, x: Tensor, rank: int | None = None, *, ordered: bool = True, grid: Grid | None = None
    ) -> Factors:
        """Return A [b, T, r'] and B [b, r', D] of x [b, T, D], as `LowRankFactorModel.forward`."""
        return self.factors_of(x, *self.in_norm(x, grid), rank, grid)

    def factors_of(
        self, x: Tensor, z: Tensor, w: Tensor, rank: int | None = None, grid: Grid | None = None
    ) -> Factors:
        """Return the factors of x [b, T, D], given its `in_norm` z and w (the same at any rank)."""
        u = self.core.basis(z, self.rank_at(x, rank), grid)  #     [b, T, r']
        b = u.mT @ (w * x) / (1 + self.config.lambda_B)  #         [b, r', D]
        return self.core.gated(u) / w, b

    def loss_terms(self, x: Tensor, singular_values: Tensor, grid: Grid | None = None) -> LossTerms:
        """Return the core's terms on Z, in a norm that stays as it is (`task_terms` learns one)."""
        z = self.in_norm(x, grid)[0].detach()
        return self.core.loss_terms(z, exact_singular_values(z.nan_to_num()), grid)

    def exact_product(
        self, x: Tensor, rank: int, grid: Grid | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return A·B [b, T, D] as a perfect sketch would give it, with the gradient by w and S.

        And without a gradient Z [b, T, D] and its σ [b, min(T, D)] float64.
        """
        z, w = self.in_norm(x, grid)
        wide, rank = z.double(), min(rank, *x.shape[-2:])
        projector, squares = leading_projector(wide @ wide.mT, rank)
        sigma = squares.flip(-1)[..., : min(x.shape[-2:])].clamp_min(0).sqrt()
        return projector.to(x.dtype) @ (w * x) / w, z.detach(), sigma


def in_own_norm(
    model: LowRankFactorModel | TaskFactorModel, batches: Iterable[Batch]
) -> tuple[LowRankFactorModel, Iterator[Batch]]:
    """Return the core model and its batches, mapped into the norm that it trains in.

    The batches hold Z with Z's singular values. What the core leaves of Z is what A·B leaves of X
    in that norm: w (X − A B) S. A model of the Frobenius norm and its batches come back unchanged.
    """
    if model.norm is None:
        return model, iter(batches)

    def mapped() -> Iterator[Batch]:
        for batch in batches:
            z = model.in_norm(batch.x, batch.grid)[0]
            yield batch._replace(x=z, singular_values=exact_singular_values(z.nan_to_num()))

    return model.core, mapped()


def task_terms(
    model: TaskFactorModel, head: TaskHead, batch: Batch, step: int
) -> dict[str, Tensor]:
    """Return the core's `LossTerms` on Z by name, and "task", the mean of ½ log(head.loss).

    The sketch learns to reach Z's subspace, and not to change Z. For relative errors "task" is
    their mean logarithm; weighs every image and every rank alike, as the reconstruction does by its
    optimum. The rank is that of TRAINED_RANKS whose turn it is.
    """
    ranks = trained_ranks(model)
    x_hat, z, sigma = model.exact_product(batch.x, ranks[step % len(ranks)], batch.grid)
    terms = model.core.loss_terms(z, sigma, batch.grid)._asdict()
    if gaps := [m.orthogonality() for m in model.modules() if isinstance(m, SVDLinear)]:
        terms["lora_ortho"] = torch.stack(gaps).mean()  # the norm's branches have such layers too
    loss = head.loss(head.of_batch(batch, x_hat), head.of_full(batch))
    return terms | {"task": _log_loss(loss).mean() / 2}


def _log_loss(loss: Tensor) -> Tensor:
    """Return the logarithms of losses, which count as LOSS_FLOOR at least.

    Where A·B is X up to rounding, the loss is rounding too: it gets no gradient, whose step would
    be the largest of all.
    """
    return loss.clamp_min(LOSS_FLOOR).log()


@torch.inference_mode()
def task_record(
    model: TaskFactorModel, head: TaskHead, batches: Iterable[Batch]
) -> dict[str, float]:
    """Measure what the head makes of A·B on `batches` at the trained ranks, for a history entry.

    val_task_error: geometric mean over ranks of the mean task error. val_task_loss: geometric mean
    over ranks and images of the head's loss, exp(2 · task): what is trained. Each process has
    its part of the images; the result is of all of them, in all.
    """
    parts: dict[str, list[Tensor]] = {"error": [], "log_loss": []}  # [b, ranks] each
    for batch in batches:
        full = head.of_full(batch)
        z, w = model.in_norm(batch.x, batch.grid)
        factors = [model.factors_of(batch.x, z, w, r, batch.grid) for r in trained_ranks(model)]
        outputs = [head.of_batch(batch, a @ b) for a, b in factors]
        parts["error"].append(torch.stack([head.error(y, full) for y in outputs], -1).cpu())
        losses = torch.stack([_log_loss(head.loss(y, full)) for y in outputs], -1)
        parts["log_loss"].append(losses.double().cpu())
    columns = processes.gather_columns({k: torch.cat(v) for k, v in parts.items() if v})
    return {
        "val_task_error": float(columns["error"].mean(0).log().mean().exp()),
        "val_task_loss": float(columns["log_loss"].mean().exp()),
    }


def trained_ranks(model: TaskFactorModel) -> list[int]:
    """Return TRAINED_RANKS up to the model's own, or that alone."""
    rank = model.current_effective_rank()
    return [r for r in TRAINED_RANKS if r <= rank] or [rank]
