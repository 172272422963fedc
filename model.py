"""The factor model, X ≈ A·B: two branches sketch X from its rows and columns, linear algebra
refines the sketch to factors.

Legend: b images in a batch, T tokens of a grid (rows, columns), T₀ those of the model's own grid,
D features, n of them that the branches read, r rank, p extra sketch columns (`oversample`),
c = r + p sketch columns, K refinement steps. X [b, T, D] float32 normalised tokens.

From top to bottom: configuration, layers, branches, errors, the model, its three architectures
and their names. `LowRankFactorModel.forward` is the place to begin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_tokens.errors import optimum
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid, default_grid
from lowrank_tokens.linalg import (
    NORM_FLOOR,
    Factors,
    Subspace,
    gaussian,
    refine,
    start_shifts,
    truncate_product,
)

OPTIMUM_FLOOR = 1e-6  # of ‖X‖²: below it an image is exact, and its loss is no longer magnified
ROW_GAIN = 1e-4  # start of row_net's share of the sketch: more only blurs a new column sketch
FEATURES_READ = 256  # n, but never fewer than T₀, so that the features read can span X


@dataclass
class ModelConfig:
    """Configuration of a model: what the flags of the same names set and a checkpoint stores.

    Raises InputError for a rank, factors, K or p that are impossible, ValueError for a grid that
    has not T₀ positions.
    """

    arch: str  # a name of ARCHITECTURES or an alias
    input_dim: int  # D of the cache
    num_tokens: int  # T₀, tokens of the cache's (most frequent) grid
    rank: int  # r ≤ min(T₀, D); an image of fewer tokens is factored at its own min(T, D)
    grid: Grid | None = None  # rows and columns of the T₀ tokens; None: a square or one row
    factors: str = "projected"  # or "direct": the branches predict A and B, on this grid alone
    refine_steps: int | None = None  # K ≥ 0 of projected factors; None: 1
    oversample: int | None = None  # p ≥ 0 of projected factors; None: 32, or what min(T₀, D) allows
    lambda_B: float = 1e-4  # ridge of the exact coefficients B
    hidden_dim: int = 256  # width of the branches' hidden layers
    num_blocks: int | None = None  # residual blocks (None: 1) or hidden layers (None: 2)
    dropout: float = 0.0  # in the branches, while training
    precision: str = "float32"  # or "bf16", of the branches; the linear algebra is float64

    def __post_init__(self) -> None:
        self.arch = canonical_arch(self.arch)
        limit = min(self.num_tokens, self.input_dim)
        if not 1 <= self.rank <= limit:
            raise InputError(f"--rank {self.rank} is out of range: type 1 to {limit} = min(T, D)")
        self.grid = tuple(self.grid or default_grid(self.num_tokens))
        if math.prod(self.grid) != self.num_tokens:
            raise ValueError(f"a grid of {self.grid} has not {self.num_tokens} tokens")
        if self.num_blocks is None:
            self.num_blocks = 1 if self.arch == "ResMLP" else 2
        if self.factors == "projected":
            self._complete_projected(limit - self.rank)
        elif self.factors != "direct":
            raise InputError(f"--factors {self.factors} is unknown: type projected or direct")
        elif (self.refine_steps, self.oversample) != (None, None):
            raise InputError("--factors direct: omit --refine_steps and --oversample")

    def _complete_projected(self, most_extra: int) -> None:
        if self.refine_steps is None:
            self.refine_steps = 1
        if self.refine_steps < 0:
            raise InputError(f"--refine_steps {self.refine_steps} is out of range: type 0 or more")
        if self.oversample is None:
            self.oversample = min(32, most_extra)
        if not 0 <= self.oversample <= most_extra:
            raise InputError(
                f"--oversample {self.oversample}: at rank {self.rank} type 0 to {most_extra}"
            )


# ------------------------------------------------------------------ layers, and other grids


class Resize(NamedTuple):
    """A change from the model's own grid to that of the images at hand, for tables of positions.

    Tables are interpolated as a ViT's position table is (Dosovitskiy et al. 2021, sec. 3.2).
    """

    model_grid: Grid  # rows and columns of the T₀ tokens
    image_grid: Grid  # those of the T tokens

    @property
    def scale(self) -> float:
        """T₀/T: a sum over T samples of one smooth map grows as T."""
        return math.prod(self.model_grid) / math.prod(self.image_grid)

    def values(self, table: Tensor, axis: int = 0) -> Tensor:
        """Interpolate `axis` of a table from the T₀ positions of the model's grid to the images' T.

        Bicubic; where a side shrinks the filter is widened, as PIL's is, so that no position is
        passed over.
        """
        rows = table.movedim(axis, -1)  #                                      [..., T₀]
        shrinks = self.image_grid[0] < self.model_grid[0] or self.image_grid[1] < self.model_grid[1]
        maps = F.interpolate(
            rows.reshape(1, -1, *self.model_grid),
            self.image_grid,
            mode="bicubic",
            antialias=shrinks,
        )  #                                                                   [1, n, rows, columns]
        return maps.reshape(*rows.shape[:-1], -1).movedim(-1, axis)  #         T along `axis`

    def sums(self, weight: Tensor) -> Tensor:
        """Interpolate weights [n, T₀] of sums over positions: [n, T], scaled by T₀/T."""
        return self.scale * self.values(weight, axis=1)

    def sums_with_detail(self, weight: Tensor) -> Tensor:
        """Return `sums` with white noise, always the same draw, in the modes that it cannot have.

        An interpolated table is smooth: of T modes it has T₀. A sketch made with it misses what X
        has in the others, a Gaussian sketch does not. The noise has the share 1 − T₀/T of the
        table's mean square, and its scale no gradient.
        """
        table = self.values(weight, axis=1)
        share = max(0.0, 1 - self.scale)
        noise = gaussian(*table.shape).to(table)
        return self.scale * (table + noise * (share * table.detach().square().mean()).sqrt())


class GridLinear(nn.Linear):
    """A linear layer that keeps the scale of its input: weights N(0, 1/in), bias 0.

    `forward` gives the first `columns` outputs (None: all). Where inputs or outputs are positions
    of a grid, `inputs` or `outputs` resizes them to another.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        nn.init.normal_(self.weight, std=in_features**-0.5)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        columns: int | None = None,
        inputs: Resize | None = None,
        outputs: Resize | None = None,
    ) -> Tensor:
        weight, bias = self.weight[:columns], self.bias[:columns]
        if inputs is not None:
            weight = inputs.sums(weight)
        if outputs is not None:
            weight, bias = outputs.values(weight), outputs.values(bias)
        return F.linear(x, weight, bias)

    def zero_(self) -> None:
        """Make the layer's outputs zero; its weights still have a gradient."""
        nn.init.zeros_(self.weight)


class SVDLinear(nn.Module):
    """AdaLoRA's triplet form (Zhang et al. 2023): y = (W + α/k · B diag(E) A) x + bias.

    W [out, in] is trained too; lora_A [k, in], lora_E [k, 1] (starts at 0), lora_B [out, k].
    """

    def __init__(self, in_features: int, out_features: int, k: int = 8, alpha: float = 16) -> None:
        super().__init__()
        base = GridLinear(in_features, out_features)
        self.weight_0, self.bias = base.weight, base.bias
        self.scale = alpha / k
        self.lora_A = nn.Parameter(torch.randn(k, in_features) / in_features**0.5)
        self.lora_E = nn.Parameter(torch.zeros(k, 1))
        self.lora_B = nn.Parameter(torch.randn(out_features, k) / out_features**0.5)

    @property
    def weight(self) -> Tensor:
        """The merged weight [out, in]: one product for all tokens, O(out · in · k) to merge."""
        return self.weight_0 + self.scale * self.lora_B @ (self.lora_E * self.lora_A)

    def forward(
        self, x: Tensor, columns: int | None = None, inputs: Resize | None = None
    ) -> Tensor:
        weight = self.weight[:columns]
        return F.linear(x, inputs.sums(weight) if inputs else weight, self.bias[:columns])

    def zero_(self) -> None:
        """Make a new layer's outputs zero (lora_E starts there)."""
        nn.init.zeros_(self.weight_0)

    def orthogonality(self) -> Tensor:
        """Return the mean of ‖A Aᵀ − I‖_F and ‖BᵀB − I‖_F, a scalar (AdaLoRA, eq. 4)."""
        eye = torch.eye(len(self.lora_A), dtype=self.lora_A.dtype, device=self.lora_A.device)
        gaps = self.lora_A @ self.lora_A.mT - eye, self.lora_B.mT @ self.lora_B - eye
        return torch.stack([torch.linalg.matrix_norm(gap) for gap in gaps]).mean()


class GridLayerNorm(nn.LayerNorm):
    """LayerNorm over positions or features; `resize` interpolates its weights over positions."""

    def forward(self, x: Tensor, resize: Resize | None = None) -> Tensor:
        weight, bias = self.weight, self.bias
        if resize is not None:
            weight, bias = resize.values(weight), resize.values(bias)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


# ---------------------------------------------------------------------------------- branches


class ResidualBlock(nn.Module):
    """x + W₂ GELU(W₁ LN(x)), as wide as its input."""

    def __init__(self, width: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = GridLinear(width, hidden_dim), GridLinear(hidden_dim, width)
        self.norm, self.dropout = GridLayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor, resize: Resize | None = None) -> Tensor:
        hidden = F.gelu(self.up(self.norm(x, resize), inputs=resize))
        return x + self.down(self.dropout(hidden), outputs=resize)


class ResidualBranch(nn.Module):
    """skip(x) + head(blocks(x)), linear where it is new and where it has no blocks."""

    def __init__(self, in_features: int, out_features: int, config: ModelConfig) -> None:
        super().__init__()
        width = (in_features, config.hidden_dim, config.dropout)
        self.blocks = nn.ModuleList(ResidualBlock(*width) for _ in range(config.num_blocks))
        self.skip = GridLinear(in_features, out_features)
        self.head = None
        if config.num_blocks:
            self.head = nn.Linear(in_features, out_features, bias=False)
            nn.init.zeros_(self.head.weight)

    def zero_(self) -> None:
        """Make a new branch's outputs zero."""
        self.skip.zero_()

    def forward(self, x: Tensor, columns: int, resize: Resize | None = None) -> Tensor:
        """Return the first `columns` outputs for x [..., in]; `resize` where `in` are positions."""
        straight = self.skip(x, columns, resize)  # [..., c]
        return straight if self._is_linear(x) else straight + self._nonlinear(x, columns, resize)

    def _is_linear(self, x: Tensor) -> bool:
        # blocks of a new branch give zeros, and at T = 4096 they take a third of the time
        if self.head is None:
            return True
        return x.is_cpu and not torch.is_grad_enabled() and not self.head.weight.any()

    def _nonlinear(self, x: Tensor, columns: int, resize: Resize | None) -> Tensor:
        """Return head(blocks(x))."""
        for block in self.blocks:
            x = block(x, resize)
        weight = self.head.weight[:columns]
        return F.linear(x, weight if resize is None else resize.sums(weight))

    def all_features(self, x: Tensor, read: Tensor, columns: int, resize: Resize) -> Tensor:
        """Return col_net's outputs [b, D, c] for all feature maps x [b, D, T] on another grid.

        The features that are not read [n] take the skip alone, with noise in the modes that its
        table has not: mean excess at rank 128 on 37 × 37 real tokens 0.051 to 0.071 %, with a
        smooth table 0.078 %, by a fresh Gaussian sketch 0.065 %.
        """
        table = resize.sums_with_detail(self.skip.weight)[:columns]
        straight = F.linear(x, table, self.skip.bias[:columns])  # [b, D, c]
        if self._is_linear(x):
            return straight
        return straight.index_add(-2, read, self._nonlinear(x[..., read, :], columns, resize))


class StackBranch(nn.Module):
    """A plain stack: hidden layers with GELU between, then a linear head."""

    layer: type[GridLinear | SVDLinear] = GridLinear

    def __init__(self, in_features: int, out_features: int, config: ModelConfig) -> None:
        super().__init__()
        widths = [in_features] + [config.hidden_dim] * config.num_blocks
        self.hidden = nn.ModuleList(
            self.layer(*pair) for pair in zip(widths, widths[1:], strict=False)
        )
        self.head, self.dropout = self.layer(widths[-1], out_features), nn.Dropout(config.dropout)

    def zero_(self) -> None:
        """Make a new branch's outputs zero."""
        self.head.zero_()

    def forward(self, x: Tensor, columns: int, resize: Resize | None = None) -> Tensor:
        """Return the first `columns` outputs for x [..., in]; `resize` where `in` are positions."""
        for layer in self.hidden:
            x = self.dropout(F.gelu(layer(x, inputs=resize)))
            resize = None  # only the first layer reads positions
        return self.head(x, columns, resize)

    def all_features(self, x: Tensor, read: Tensor, columns: int, resize: Resize) -> Tensor:
        """Return col_net's outputs [b, D, c] for all feature maps x [b, D, T] on another grid.

        Without a linear path these are a Gaussian sketch of all features, with a tenth of the
        outputs for those that are read [n]. (The resized outputs alone: 0.17 % mean excess at rank
        128 on 37 × 37 real tokens; a fresh Gaussian sketch 0.065 %.)
        """
        straight = x @ gaussian(x.shape[-1], columns).to(x)  # [b, D, c]
        outputs = self(x[..., read, :], columns, resize).to(straight.dtype)  # [b, n, c]
        padded = torch.zeros_like(straight).index_copy(-2, read, outputs)
        return weighted_sum(straight, padded, 0.1)


class SVDStackBranch(StackBranch):
    """A stack of `SVDLinear` layers."""

    layer = SVDLinear


def weighted_sum(y: Tensor, other: Tensor, gain: Tensor | float) -> Tensor:
    """Return y + gain · ‖y‖/‖other‖ · other [b, T, c]: `gain` is relative to y's length.

    Only the span of a sketch counts, so one of the two norms is enough.
    """
    length, other_length = (
        torch.linalg.matrix_norm(m, keepdim=True).clamp_min(NORM_FLOOR) for m in (y, other)
    )
    return torch.addcmul(y, other, gain * (length / other_length))


# ------------------------------------------------------------------------ features, columns


def even_features(features: int, tokens: int) -> Tensor:
    """Return n of D features, evenly spaced: [n] int64, n = 256 but no fewer than T."""
    count = min(features, max(FEATURES_READ, tokens))
    return torch.arange(count) * features // count


def pivoted_features(moment: Tensor, count: int) -> Tensor:
    """Choose the features that leave least of the others unexplained, greedily: [n] int64, sorted.

    Pivoted Cholesky of the second moment C [D, D]: each pivot is the feature with most energy
    outside the span of those before it (Harbrecht et al. 2012). Where C has a lower rank than
    `count`, those with most energy of their own fill up. O(D n²), float64 on the CPU.
    """
    moment = moment.double().cpu()
    left = moment.diagonal().clone()  # energy outside the span of the features chosen
    rounding = torch.finfo(left.dtype).eps * len(left) * left.max()
    factor = moment.new_zeros(len(left), count)
    chosen: list[int] = []
    while len(chosen) < count and left.max() > rounding:
        j, k = int(left.argmax()), len(chosen)
        row = moment[:, j] - factor[:, :k] @ factor[j, :k]
        factor[:, k] = row / left[j].sqrt()
        left -= factor[:, k].square()
        chosen.append(j)
        left[chosen] = 0
    energy = moment.diagonal().clone()
    energy[chosen] = -1
    return torch.tensor(sorted(chosen + energy.topk(count - len(chosen)).indices.tolist()))


def columns_for(rank: int, oversample: int, limit: int) -> int:
    """Return the sketch's columns for a rank: twice as many and at least p more, ≤ limit."""
    return min(limit, max(2 * rank, rank + oversample))


# ------------------------------------------------------------------------------------ errors


class SquaredErrors(NamedTuple):
    """A batch's squared errors, sums over one image each."""

    bound: Tensor  # [b] float64, ≥ ‖X − A·B‖²: what is trained
    error: Tensor  # [b] float64 ‖X − A·B‖² of A·B as users get it; no gradient
    b_squared: Tensor  # [b] float64 ‖B‖²
    component: Tensor  # [b, r] cost of dropping a component; no gradient


def projected_errors(
    space: Subspace, x: Tensor, gate: Tensor | None, ridge: float
) -> SquaredErrors:
    """Return the squared errors of projected factors without computing A·B.

    With U orthonormal, B = UᵀX / (1 + λ) and A = U diag(g):
    ‖X − A B‖² = ‖X‖² − Σ_i ‖u_iᵀX‖² (1 − (1 − g_i / (1 + λ))²), and θ_i ≤ ‖u_iᵀX‖² gives a bound.
    """
    energy = x.double().square().sum((-2, -1))  # [b] ‖X‖²
    g = 1.0 if gate is None else gate[: space.theta.shape[-1]].double()
    kept = 1 - (1 - g / (1 + ridge)) ** 2
    bound = energy - (space.theta * kept).sum(-1)
    b_squared = space.theta.sum(-1) / (1 + ridge) ** 2
    with torch.no_grad():
        component = (space.u.mT @ x.double()).square().sum(-1)  # [b, r]
        error = energy - (component * kept).sum(-1)
    return SquaredErrors(bound, error, b_squared, component / (1 + ridge) ** 2)


def product_errors(x: Tensor, a: Tensor, b: Tensor) -> SquaredErrors:
    """Return the squared errors of any A [b, T, r] and B [b, r, D]; bound and error are equal."""
    error = (x - a @ b).double().square().sum((-2, -1))
    component = a.square().sum(-2) * b.square().sum(-1)  # [b, r]
    b_squared = b.double().square().sum((-2, -1))
    return SquaredErrors(error, error.detach(), b_squared, component.detach())


def activation_orth_regu_A(a: Tensor) -> Tensor:
    """Return the mean over images of ‖ÂᵀÂ − I‖_F² / c², Â being a [b, T, c] with unit columns."""
    unit = F.normalize(a, dim=-2, eps=NORM_FLOOR)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return (unit.mT @ unit - eye).square().mean()


class LossTerms(NamedTuple):
    """One batch's terms of the loss and numbers for the log; every one is a mean over images."""

    reconstruction: Tensor  # bound_i / max(optimum_mse_i, 1e-6 ‖X_i‖² / TD), bound_i ≥ mse_i
    mse: Tensor  # of A·B as users get it; logged, not in the loss, no gradient
    optimum_mse: Tensor  # logged; no gradient
    B: Tensor  # ‖B‖_F² / (T D)
    ortho: Tensor  # ‖ŶᵀŶ − I‖_F² / c² of the sketch
    act: Tensor  # the same of row_net's output alone
    lora_ortho: Tensor  # of SVDLinear's lora_A and lora_B
    component_energy: Tensor  # [r] no gradient: cost of dropping a component, squared error


# --------------------------------------------------------------------------------- the model


class Sketch(NamedTuple):
    """A sketch of X from both sides."""

    y: Tensor  # [b, T, c]
    row_output: Tensor  # [b, T, c] row_net's part of it


class LowRankFactorModel(nn.Module):
    """X ≈ A·B at rank r. `model(x)` gives A [b, T, r] and B [b, r, D].

    The architectures below say what kind of branches row_net (D → c) and col_net (T → c) are.
    Three ranks: `config.rank` r, of which the branches have outputs; `rank_in_use` ≤ r, the columns
    of A that are computed; `current_effective_rank()` ≤ that, those of them that are not masked.
    """

    branch_class: type[ResidualBranch | StackBranch]
    # which task the norm was made for: None for the Frobenius norm (`TaskFactorModel` has one)
    norm: dict[str, str | None] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rank_in_use = config.rank  # fewer once a lower rank is final
        features, tokens, direct = config.input_dim, config.num_tokens, config.factors == "direct"
        # direct factors need B's columns of all features
        selected = torch.arange(features) if direct else even_features(features, tokens)
        self.register_buffer("selected", selected)  # [n] features that the branches read
        self.row_net = self.make_branch(len(selected), self.sketch_columns())
        self.col_net = self.make_branch(tokens, self.sketch_columns())
        self.row_gain = nn.Parameter(torch.tensor(ROW_GAIN))
        # sigmoid keeps a shift in (0, 1)
        self.shift_logits = nn.Parameter(start_shifts(config.refine_steps or 0).logit().float())
        if direct:  # starts as the projection on a basis of features, shared by all images
            basis = torch.linalg.qr(torch.randn(features, config.rank)).Q.mT.contiguous()
            # V [r, D] is not trained: it overfits 25 scenes faster than the branches learn
            self.register_buffer("shared_basis", basis)
            self.row_gains = nn.Parameter(torch.zeros(config.rank, 1))
            self.column_gains = nn.Parameter(torch.zeros(config.rank, 1))

    def make_branch(self, in_features: int, out_features: int) -> ResidualBranch | StackBranch:
        """Make a new branch of this architecture."""
        return self.branch_class(in_features, out_features, self.config)

    def forward(
        self, x: Tensor, rank: int | None = None, *, ordered: bool = True, grid: Grid | None = None
    ) -> Factors:
        """Return A [b, T, r'] and B [b, r', D] of x [b, T, D].

        Args: rank: r' ≤ r, by default the rank in use, at most min(T, D). grid: rows and columns of
            the T tokens, by default the model's own. ordered=False leaves the components of a model
            without extra columns in no order, which saves the eigenproblem.
        One model serves every r': projected factors are cut in Ritz order, direct factors are
        replaced by the truncated SVD of their product. Masked columns of A are zero.
        """
        rank = self.rank_at(x, rank)
        if self.config.factors == "direct":
            a, b = self.direct_factors(x, grid)  #                 [b, T, r], [b, r, D]
            return (a, b) if rank == self.config.rank else truncate_product(a, b, rank)
        u = self.basis(x, rank, grid, ordered)  #                  [b, T, r']
        b = u.mT @ x / (1 + self.config.lambda_B)  #               [b, r', D] argmin ‖X−UB‖² + λ‖B‖²
        return self.gated(u), b

    def basis(self, x: Tensor, rank: int, grid: Grid | None = None, ordered: bool = True) -> Tensor:
        """Return U [b, T, r'], the leading left subspace of X, refined from the sketch."""
        y = self.sketch(x, self.sketch_columns(rank), grid).y  #   [b, T, c]
        return refine(y, x, self.shifts, rank, self._in_order(rank, ordered)).u.to(x.dtype)

    def _in_order(self, rank: int, ordered: bool) -> bool:
        # a cut rank needs an order, and a gate is one of components in order of size
        return ordered or rank < self.config.rank or self.gate() is not None

    def direct_factors(self, x: Tensor, grid: Grid | None = None) -> Factors:
        """Return A = (X Vᵀ + g row_net(X)) · gate and B = V + h col_net(Xᵀ)ᵀ / √D.

        V [r, D] is the basis that all images share. The gains g and h [r, 1], one a component,
        start at 0 (LayerScale, Touvron et al. 2021): the first steps of training move A and B by
        next to nothing, where they would move zero weights of a thousand inputs far. Raises
        InputError for another grid than the model's own.
        """
        if self.resize_to(grid):
            trained, asked = ("{} × {}".format(*g) for g in (self.config.grid, grid))
            raise InputError(
                f"direct factors are tied to the grid they were trained on, {trained}, not "
                f"{asked}: train with --factors projected"
            )
        rows, columns = (t.to(x.dtype) for t in self.branch_outputs(x, self.config.rank))
        a = x @ self.shared_basis.mT + self.row_gains.mT * rows  #  [b, T, r]
        scale = x.shape[-1] ** -0.5  # of V's entries
        return self.gated(a), self.shared_basis + self.column_gains * scale * columns.mT

    def sketch(self, x: Tensor, columns: int, grid: Grid | None = None) -> Sketch:
        """Return Y ∝ X_s col_net(X_sᵀ)/‖·‖ + g row_net(X_s)/‖·‖ with c = min(`columns`, T, D).

        X_s are the selected features. A linear col_net makes X_s X_sᵀ W, a power step on some
        features: its components fall as σ², those of row_net as σ or not at all, so a new row_net
        has next to no weight g.
        """
        columns = min(columns, *x.shape[-2:])
        rows, weights = (t.to(x.dtype) for t in self.branch_outputs(x, columns, grid))
        read = x if weights.shape[-2] == x.shape[-1] else x[..., self.selected]  # [b, T, n]
        return Sketch(weighted_sum(read @ weights, rows, self.row_gain), rows)

    def branch_outputs(
        self, x: Tensor, columns: int, grid: Grid | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return row_net's outputs [b, T, c], and col_net's for the features read [b, n, c].

        On another grid col_net's are of all features [b, D, c]. Raises ValueError where x is not of
        D features and the grid's tokens.
        """
        grid = grid or self.config.grid
        if x.shape[-2:] != (math.prod(grid), self.config.input_dim):
            raise ValueError(
                f"tokens of {grid[0]} × {grid[1]} positions and {self.config.input_dim} features "
                f"are expected, not {x.shape[-2]} × {x.shape[-1]}: name their grid"
            )
        read, resize = x[..., self.selected], self.resize_to(grid)  # [b, T, n]
        bf16 = self.config.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            rows = self.row_net(read, columns)
            if resize is None:
                return rows, self.col_net(read.mT, columns)
            return rows, self.col_net.all_features(x.mT, self.selected, columns, resize)

    def resize_to(self, grid: Grid | None) -> Resize | None:
        """Return what resizes tables over positions to `grid`; None on the model's own."""
        same = grid is None or tuple(grid) == self.config.grid
        return None if same else Resize(self.config.grid, tuple(grid))

    @property
    def shifts(self) -> Tensor:
        """s_k [K] in (0, 1)."""
        return self.shift_logits.sigmoid()

    def gate(self) -> Tensor | None:
        """Return the factors [r] of the columns of A; None where there are none."""
        return None

    def gated(self, a: Tensor) -> Tensor:
        """Multiply the columns of A [b, T, r'] by the gate's first r' factors."""
        gate = self.gate()
        return a if gate is None else a * gate[: a.shape[-1]]

    def current_effective_rank(self) -> int:
        """Return the rank of A·B: r, or the number of unmasked components."""
        return self.config.rank

    def rank_at(self, x: Tensor, rank: int | None = None) -> int:
        """Return the rank at which x [b, T, D] is factored: the one asked for, ≤ min(T, D)."""
        return min(self.rank_in_use if rank is None else rank, *x.shape[-2:])

    def sketch_columns(self, rank: int | None = None) -> int:
        """Return the columns of the sketch for a rank r' ≤ r (None: the rank in use)."""
        extra, rank = self.config.oversample or 0, self.rank_in_use if rank is None else rank
        return columns_for(rank, extra, self.rank_in_use + extra)

    def start_from(self, moment: Tensor) -> None:
        """Start a new model from the second moment Σ XᵀX of training tokens, [D, D] float64.

        The branches of projected factors read the features that `pivoted_features` chooses: the
        excess of another image is then two thirds of that with evenly spaced ones, at the same
        cost. The basis of direct factors becomes the leading principal axes, so that they
        start as PCA.
        """
        if self.config.factors == "direct":
            axes = torch.linalg.eigh(moment)[1][:, -self.config.rank :].flip(-1)
            self.shared_basis.data.copy_(axes.mT)
        else:
            self.selected.copy_(pivoted_features(moment, len(self.selected)))

    def loss_terms(self, x: Tensor, singular_values: Tensor, grid: Grid | None = None) -> LossTerms:
        """Return all terms of the loss for x [b, T, D], given its σ [b, min(T, D)] float64."""
        if self.config.factors == "direct":
            a, b = self.direct_factors(x, grid)
            sketch, errors = Sketch(a, a), product_errors(x, a, b)
        else:
            sketch, rank = self.sketch(x, self.sketch_columns(), grid), self.rank_at(x)
            ordered = self.gate() is not None
            space = refine(sketch.y, x, self.shifts, rank, ordered)
            errors = projected_errors(space, x, self.gate(), self.config.lambda_B)
        energy = x.double().square().sum((-2, -1))  # [b]
        size = x.shape[-2] * x.shape[-1]
        best = optimum(singular_values, self.current_effective_rank()).square() * energy
        # LayerNorm makes constant tokens zero: an image of them weighs as any other exact one does
        scale = torch.where(energy > OPTIMUM_FLOOR * size, energy, size)
        floor = best.maximum(OPTIMUM_FLOOR * scale)
        gaps = [m.orthogonality() for m in self.modules() if isinstance(m, SVDLinear)]
        component = errors.component.mean(0)
        return LossTerms(
            reconstruction=(errors.bound / floor).mean(),
            mse=errors.error.mean() / size,
            optimum_mse=best.mean() / size,
            B=errors.b_squared.mean() / size,
            ortho=activation_orth_regu_A(sketch.y),
            act=activation_orth_regu_A(sketch.row_output),
            lora_ortho=torch.stack(gaps).mean() if gaps else self.row_gain.new_zeros(()),
            # a small image has fewer components
            component_energy=F.pad(component, (0, self.rank_in_use - len(component))),
        )


# ----------------------------------------------------------------- the three architectures
class LowRankProjSymmetric(LowRankFactorModel):
    """ResMLP: a linear layer and residual blocks beside it; without blocks it is linear."""

    branch_class = ResidualBranch


class LowRankProjMLP(LowRankFactorModel):
    """MLP: plain stacks of GridLinear with GELU between, two hidden layers."""

    branch_class = StackBranch


class AdaptiveLowRankProjAdaLoRA(LowRankFactorModel):
    """AdaLoRA: stacks of SVDLinear and a global gate `lora_E` [r, 1] that a mask can close.

    The mask is a buffer applied in forward: a masked column of A is exactly zero, whatever the
    optimiser does to `lora_E`.
    """

    branch_class = SVDStackBranch

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.lora_E = nn.Parameter(torch.ones(config.rank, 1))
        self.register_buffer("rank_mask", torch.ones(config.rank, dtype=torch.bool))
        self.register_buffer("narrowed", torch.zeros((), dtype=torch.bool))
        self._read_mask()
        self.register_load_state_dict_post_hook(lambda module, _: module._read_mask())

    def gate(self) -> Tensor:
        return (self.lora_E * self.rank_mask.unsqueeze(-1)).squeeze(-1)

    def effective_rank_mask(self) -> Tensor:
        """Return which components are kept, [r] bool."""
        return self.rank_mask

    def current_effective_rank(self) -> int:
        return self._effective_rank

    def set_rank_mask(self, mask: Tensor, final: bool = False) -> None:
        """Keep the components where mask [r] is True; `final` narrows the sketch to k + p columns.

        Only projected factors narrow: there components are in Ritz order and the mask is a prefix.
        """
        self.rank_mask.copy_(mask)
        self.narrowed.fill_(final and self.config.factors == "projected")
        self._read_mask()

    def _read_mask(self) -> None:
        self._effective_rank = int(self.rank_mask.sum())
        self.rank_in_use = self._effective_rank if self.narrowed else self.config.rank


ARCHITECTURES: dict[str, type[LowRankFactorModel]] = {
    "ResMLP": LowRankProjSymmetric,
    "MLP": LowRankProjMLP,
    "AdaLoRA": AdaptiveLowRankProjAdaLoRA,
}
_ALIASES = {name.lower(): name for name in ARCHITECTURES} | {"lowrankprojmlp": "MLP"}
_ALIASES |= dict.fromkeys(("symmetric", "lowrankprojsymmetric"), "ResMLP")
_ALIASES |= dict.fromkeys(("adaptive_adalora", "adaptive"), "AdaLoRA")


def canonical_arch(name: str) -> str:
    """Return the name whose folder results go to, from any alias in any case.

    Raises InputError for an unknown name.
    """
    try:
        return _ALIASES[name.lower()]
    except KeyError:
        raise InputError(
            f"--arch {name} is unknown: type one of {', '.join(ARCHITECTURES)} "
            f"(aliases {', '.join(sorted(set(_ALIASES) - {n.lower() for n in ARCHITECTURES}))})"
        ) from None


def build_model(config: ModelConfig) -> LowRankFactorModel:
    """Build a new model of a configuration."""
    return ARCHITECTURES[config.arch](config)


def get_model_by_name(
    arch: str, *, input_dim: int, num_tokens: int, rank: int, **settings: str | float | Grid | None
) -> LowRankFactorModel:
    """Build a model by its architecture's name or alias; settings as in `ModelConfig`."""
    shape = {"input_dim": input_dim, "num_tokens": num_tokens, "rank": rank}
    return build_model(ModelConfig(arch, **shape, **settings))
