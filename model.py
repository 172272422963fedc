"""The factor model: two branches sketch X from its rows and columns, linear algebra does the rest.

Legend: b images in a batch, T tokens of a grid (rows, columns), T₀ those of the model's own grid,
D features, r rank, p extra sketch columns (`oversample`), c = r + p sketch columns, K refinement
steps. X [b, T, D] float32 normalised tokens.

From top to bottom: layers, the model, its three architectures, their names. How a model comes from
its branches to factors is one of two heads: `ProjectedFactors`, `DirectFactors`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_tokens.errors import optimum
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.grids import Grid, default_grid
from lowrank_tokens.linalg import (
    NORM_FLOOR,
    Factors,
    even_features,
    gaussian,
    refine,
    start_shifts,
    truncate_product,
)

OPTIMUM_FLOOR = 1e-6  # of ‖X‖²: below it an image is exact, and its loss is no longer magnified
ROW_GAIN = 1e-4  # what row_net starts with: more of it only blurs a new column sketch


# ------------------------------------------------------------------------- layers of a branch
def linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that keeps the scale of its input: weights N(0, 1/in), bias 0."""
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=in_features**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


class LayerNorm(nn.LayerNorm):
    """Over as many values as its weight has: `functional_call` may give it another number."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class ResidualBlock(nn.Module):
    """x + W₂ GELU(W₁ LN(x))."""

    def __init__(self, width: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        up, down = linear(width, hidden_dim), linear(hidden_dim, width)
        self.body = nn.Sequential(LayerNorm(width), up, nn.GELU(), nn.Dropout(dropout), down)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SVDLinear(nn.Module):
    """AdaLoRA's triplet form (Zhang et al. 2023): y = (W + α/k · B diag(E) A) x + bias.

    W [out, in] is trained too; lora_A [k, in], lora_E [k, 1] (starts at 0), lora_B [out, k].
    """

    def __init__(self, in_features: int, out_features: int, k: int = 8, alpha: float = 16) -> None:
        super().__init__()
        base = linear(in_features, out_features)
        self.weight_0, self.bias = base.weight, base.bias
        self.scale = alpha / k
        self.lora_A = nn.Parameter(torch.randn(k, in_features) / in_features**0.5)
        self.lora_E = nn.Parameter(torch.zeros(k, 1))
        self.lora_B = nn.Parameter(torch.randn(out_features, k) / out_features**0.5)

    @property
    def weight(self) -> Tensor:
        """The merged weight [out, in]: one product for all tokens, O(out · in · k) to merge."""
        return self.weight_0 + self.scale * self.lora_B @ (self.lora_E * self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def orthogonality(self) -> Tensor:
        """Mean of ‖A Aᵀ − I‖_F and ‖BᵀB − I‖_F, a scalar (AdaLoRA, eq. 4)."""
        eye = torch.eye(len(self.lora_A), dtype=self.lora_A.dtype, device=self.lora_A.device)
        gaps = self.lora_A @ self.lora_A.mT - eye, self.lora_B.mT @ self.lora_B - eye
        return torch.stack([torch.linalg.matrix_norm(gap) for gap in gaps]).mean()


class Branch(nn.Module):
    """head(body(x)) and skip(x), of which one may be missing; the first `columns` of c outputs."""

    def __init__(self, body: nn.Module, head: nn.Module | None, skip: nn.Module | None = None):
        super().__init__()
        self.skip, self.body, self.head = skip, body, head

    def scale_(self, factor: float) -> None:
        """Multiply the outputs of a new branch."""
        layer = self.skip or self.head
        (layer.weight_0 if isinstance(layer, SVDLinear) else layer.weight).data.mul_(factor)

    def forward(self, x: Tensor, columns: int) -> Tensor:
        def outputs(layer: nn.Module, x: Tensor) -> Tensor:
            bias = None if layer.bias is None else layer.bias[:columns]
            return F.linear(x, layer.weight[:columns], bias)

        if self.skip is None:
            return outputs(self.head, self.body(x))
        straight, head = outputs(self.skip, x), self.head
        if head is None or (x.is_cpu and not torch.is_grad_enabled() and not head.weight.any()):
            return straight  # a new branch: at T = 4096 its blocks take a third of the time
        return straight + outputs(head, self.body(x))


def pivoted_features(moment: Tensor, count: int) -> Tensor:
    """[n] int64 sorted: the features that leave least of the others unexplained, chosen greedily.

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
    own = moment.diagonal().clone()
    own[chosen] = -1
    return torch.tensor(sorted(chosen + own.topk(count - len(chosen)).indices.tolist()))


def add_sketches(y: Tensor, other: Tensor, gain: Tensor | float) -> tuple[Tensor, Tensor]:
    """y + gain · ‖y‖/‖other‖ · other [b, T, c], and `other`: gain is relative to y's length.

    Only the span of a sketch counts: one of the two norms is enough.
    """
    norms = (torch.linalg.matrix_norm(m, keepdim=True) for m in (y, other))
    of_y, of_other = (norm.clamp_min(NORM_FLOOR) for norm in norms)
    return torch.addcmul(y, other, gain * (of_y / of_other)), other


def columns_for(rank: int, oversample: int, limit: int) -> int:
    """Columns of the sketch for a rank: twice as many and at least `oversample` more, ≤ limit."""
    return min(limit, max(2 * rank, rank + oversample))


# ------------------------------------------------------------------ factors and their errors


def project(
    sketch: Tensor,
    x: Tensor,
    shifts: Tensor,
    rank: int,
    ordered: bool,
    gate: Tensor | None,
    ridge: float,
) -> tuple[Tensor, Tensor]:
    """A = U · gate [b, T, r'] and B = Uᵀ X / (1 + λ) [b, r', D], U by `refine` from the sketch.

    Args: gate [r] with r ≥ r', or None; ridge λ: B is argmin ‖X − U B‖² + λ ‖B‖².
    A gate is one of components in order of size, so there is an order wherever there is a gate.
    """
    u = refine(sketch, x, shifts, rank, ordered or gate is not None).u.to(x.dtype)
    b = u.mT @ x / (1 + ridge)
    return (u if gate is None else u * gate[:rank]), b


class Errors(NamedTuple):
    """A batch's squared errors, sums over one image each."""

    bound: Tensor  # [b] float64, ≥ ‖X − A·B‖²: what is trained
    error: Tensor  # [b] float64 ‖X − A·B‖² of A·B as users get it; no gradient
    b_squared: Tensor  # [b] float64 ‖B‖²
    component: Tensor  # [b, r] cost of dropping a component; no gradient


def projected_errors(
    sketch: Tensor,
    x: Tensor,
    shifts: Tensor,
    rank: int,
    gate: Tensor | None,
    ridge: float,
    energy: Tensor,
) -> Errors:
    """Of the factors of `project`, without forming A·B; energy ‖X‖² [b] float64.

    U orthonormal, B = UᵀX / (1 + λ), A = U diag(g):
    ‖X − A B‖² = ‖X‖² − Σ_i ‖u_iᵀX‖² (1 − (1 − g_i / (1 + λ))²), and θ_i ≤ ‖u_iᵀX‖² gives a bound.
    """
    space = refine(sketch, x, shifts, rank, ordered=gate is not None)
    g = 1.0 if gate is None else gate[:rank].double()
    kept = 1 - (1 - g / (1 + ridge)) ** 2
    bound = energy - (space.theta * kept).sum(-1)
    b_squared = space.theta.sum(-1) / (1 + ridge) ** 2
    with torch.no_grad():
        component = (space.u.mT @ x.double()).square().sum(-1)  # [b, r]
        error = energy - (component * kept).sum(-1)
    return Errors(bound, error, b_squared, component / (1 + ridge) ** 2)


def product_errors(x: Tensor, a: Tensor, b: Tensor) -> Errors:
    """Of any A [b, T, r] and B [b, r, D]; bound and error are the same."""
    error = (x - a @ b).double().square().sum((-2, -1))
    component = a.square().sum(-2) * b.square().sum(-1)  # [b, r]
    b_squared = b.double().square().sum((-2, -1))
    return Errors(error, error.detach(), b_squared, component.detach())


def activation_orth_regu_A(a: Tensor) -> Tensor:
    """‖ÂᵀÂ − I‖_F² / c², mean over images, scalar; Â is a [b, T, c] with columns of unit norm."""
    unit = F.normalize(a, dim=-2, eps=NORM_FLOOR)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return (unit.mT @ unit - eye).square().mean()


def resize_positions(weight: Tensor, old: Grid, new: Grid, axis: int) -> Tensor:
    """`weight` with its `axis`, the positions of grid `old`, interpolated to those of `new`.

    As a ViT's table of positions is (Dosovitskiy et al. 2021, sec. 3.2): bicubic, and with the
    filter widened where a side shrinks (as PIL resizes), so that no position is passed over.
    """
    rows = weight.movedim(axis, -1)  # [..., T₀]
    shrinks = new[0] < old[0] or new[1] < old[1]
    table = rows.reshape(1, -1, *old)
    table = F.interpolate(table, new, mode="bicubic", antialias=shrinks, align_corners=False)
    return table.reshape(*rows.shape[:-1], -1).movedim(-1, axis)  # [..., T] there


def add_detail(table: Tensor, share: float) -> Tensor:
    """`table` [n, T] plus white noise of `share` ≥ 0 of its mean square, always the same draw.

    A table interpolated from T₀ to T positions is smooth: of T modes it has T₀. A sketch made with
    it misses what X has in the others, a Gaussian one does not; a share of 1 − T₀ / T fills them.
    """
    noise = gaussian(*table.shape).to(table)
    return table + noise * (share * table.detach().square().mean()).sqrt()


Measured = tuple[Errors, Tensor, Tensor]  # and the sketch, row_net's output [b, T, c]


class ProjectedFactors:
    """The branches sketch, linear algebra does the rest: see `project`."""

    settings = ("refine_steps", "oversample")  # K, p
    any_grid = True
    start_power = 0.0  # of a sketch only the span counts
    features_seen = staticmethod(even_features)

    @staticmethod
    def chosen(steps: int | None, extra: int | None, rank: int, limit: int) -> tuple[int, int]:
        if steps is not None and steps < 0:
            raise InputError(f"--refine_steps {steps} is out of range: type 0 or more")
        most = limit - rank
        if extra is not None and not 0 <= extra <= most:
            raise InputError(f"--oversample {extra}: at rank {rank} type 0 to {most}")
        return 1 if steps is None else steps, min(32, most) if extra is None else extra

    @staticmethod
    def factors(model: nn.Module, x: Tensor, grid: Grid, rank: int, ordered: bool) -> Factors:
        sketch = model.sketch(x, model.sketch_columns(rank), grid)[0]
        ordered = ordered or rank < model.rank
        return project(sketch, x, model.shifts, rank, ordered, model.gate(), model.lambda_B)

    @staticmethod
    def measure(model: nn.Module, x: Tensor, grid: Grid, energy: Tensor) -> Measured:
        sketch, row_output = model.sketch(x, model.sketch_columns(), grid)
        errors = projected_errors(
            sketch, x, model.shifts, model.rank_at(x), model.gate(), model.lambda_B, energy
        )
        return errors, sketch, row_output


class DirectFactors:
    """The branches' outputs are the factors: A = row_net(X) · gate, B = col_net(Xᵀ)ᵀ."""

    settings = ()
    any_grid = False  # outputs for one grid's positions are none for another's
    start_power = -0.25  # of r, for each factor: A·B starts at the scale of X, not r times above it
    features_seen = staticmethod(lambda features, tokens: torch.arange(features))  # B needs all

    @staticmethod
    def chosen(steps: int | None, extra: int | None, rank: int, limit: int) -> tuple[int, int]:
        if steps is not None or extra is not None:
            raise InputError("--factors direct: omit --refine_steps and --oversample")
        return 0, 0

    @staticmethod
    def factors(
        model: nn.Module, x: Tensor, grid: Grid, rank: int, ordered: bool = False
    ) -> Factors:
        """Uncut as they come; at a lower rank the truncated SVD of their product."""
        from_rows, from_columns = model.branch_outputs(x, model.rank, grid)  # [b, T, r], [b, D, r]
        a, b, gate = from_rows.to(x.dtype), from_columns.mT.to(x.dtype), model.gate()
        a = a if gate is None else a * gate
        return (a, b) if rank == model.rank else truncate_product(a, b, rank)

    @staticmethod
    def measure(model: nn.Module, x: Tensor, grid: Grid, energy: Tensor) -> Measured:
        a, b = DirectFactors.factors(model, x, grid, model.rank)
        return product_errors(x, a, b), a, a


FACTORS = {"projected": ProjectedFactors, "direct": DirectFactors}


# ------------------------------------------------------------------------------- the model
class LossTerms(NamedTuple):
    """What one batch gives the training loop; every term is a mean over images."""

    reconstruction: Tensor  # bound_i / max(optimum_mse_i, 1e-6 ‖X_i‖² / TD), bound_i ≥ mse_i
    mse: Tensor  # of A·B as users get it; logged, not in the loss, no gradient
    optimum_mse: Tensor  # logged; no gradient
    B: Tensor  # ‖B‖_F² / (T D)
    ortho: Tensor  # ‖ŶᵀŶ − I‖_F² / c²
    act: Tensor  # the same of row_net's output alone
    lora_ortho: Tensor  # of SVDLinear's lora_A and lora_B
    component_energy: Tensor  # [r] no gradient: cost of dropping a component, squared error


class LowRankFactorModel(nn.Module):
    """X ≈ A·B at rank r. `model(x)` gives A [b, T, r], B [b, r, D]; subclasses give the branches.

    Three ranks: `rank` r, of which the branches have outputs; `rank_in_use` ≤ r, the columns of A
    that are computed; `current_effective_rank()` ≤ that, those of them that are not masked.

    On another grid each tensor of col_net over positions is interpolated (`over_positions`); what
    reads positions is scaled by T₀/T, since a sum over T samples of one smooth map grows as T. The
    seen features stay the same, the others take the linear path. A smooth table misses what X has
    in other modes (mean excess 0.078 % at rank 128 on 37 × 37 real tokens, a fresh Gaussian sketch
    0.065 %): ResMLP's gets them as noise and is level with it (0.051 to 0.071 %). MLP and AdaLoRA
    (0.17 %) have no linear path and use the Gaussian sketch there, with a tenth of their outputs.

    Args:
        input_dim, num_tokens: D and T₀ of the cache; another D is refused by `forward`.
        rank: r ≤ min(T₀, D); an image of fewer tokens is factored at its own min(T, D).
        factors: "projected" or "direct", which has no other grid than its own.
        refine_steps, oversample: K ≥ 0 and p ≥ 0 of projected factors (None: 1, and 32 or what
            min(T₀, D) allows).
        lambda_B: ridge λ_B of the exact coefficients B.
        hidden_dim, num_blocks: width and number of hidden layers or blocks (None: the class's own).
        dropout: in the branches, while training.
        precision: "float32" or "bf16", of the branches' products; the linear algebra is float64.
        grid: rows and columns of the T₀ tokens (None: a square if T₀ is one, else one row).
    """

    hidden_layers = 1
    # which metric it was trained in: None for the Frobenius norm (`TaskFactorModel` has another)
    norm: dict[str, str | None] | None = None

    def __init__(
        self,
        *,
        input_dim: int,
        num_tokens: int,
        rank: int,
        factors: str = "projected",
        refine_steps: int | None = None,
        oversample: int | None = None,
        lambda_B: float = 1e-4,
        hidden_dim: int | None = None,
        num_blocks: int | None = None,
        dropout: float = 0.0,
        precision: str = "float32",
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        limit = min(num_tokens, input_dim)
        if not 1 <= rank <= limit:
            raise InputError(f"--rank {rank} is out of range: type 1 to {limit} = min(T, D)")
        if factors not in FACTORS:
            raise InputError(f"--factors {factors} is unknown: type projected or direct")
        self.input_dim, self.num_tokens, self.rank = input_dim, num_tokens, rank
        self.grid = tuple(grid or default_grid(num_tokens))
        if math.prod(self.grid) != num_tokens:
            raise ValueError(f"a grid of {self.grid} has not {num_tokens} tokens")
        self.rank_in_use = rank  # fewer once a lower rank is final
        self.factors, self.way = factors, FACTORS[factors]
        settings = self.way.chosen(refine_steps, oversample, rank, limit)
        self.refine_steps, self.oversample = settings
        self.register_buffer("seen", self.way.features_seen(input_dim, num_tokens))
        self.lambda_B = lambda_B
        self.hidden_dim = hidden_dim or 256
        self.num_blocks = self.hidden_layers if num_blocks is None else num_blocks
        self.dropout, self.precision = dropout, precision
        self.row_net = self.make_branch(len(self.seen), self.sketch_columns())
        self.col_net = self.make_branch(num_tokens, self.sketch_columns())
        self.row_gain = nn.Parameter(torch.tensor(ROW_GAIN))
        # sigmoid keeps a shift in (0, 1)
        self.shift_logits = nn.Parameter(start_shifts(self.refine_steps).logit().float())
        if self.way.start_power:
            for branch in (self.row_net, self.col_net):
                branch.scale_(rank**self.way.start_power)

    @property
    def config(self) -> dict:
        """What a checkpoint stores; `get_model_by_name(**config)` builds the same model."""
        names = ["input_dim", "num_tokens", "grid", "rank", "factors", "lambda_B", "hidden_dim"]
        names += ["num_blocks", "dropout", "precision", *self.way.settings]
        arch = next(name for name, cls in ARCHITECTURES.items() if type(self) is cls)
        return {"arch": arch, **{name: getattr(self, name) for name in names}}

    def make_branch(self, in_features: int, out_features: int) -> nn.Module:
        raise NotImplementedError

    def over_positions(self) -> tuple[list[str], list[str]]:
        """Names of col_net's tensors [n, T₀] that sum over positions, and of those [T₀] or [T₀, n]
        that hold a value for each."""
        raise NotImplementedError

    @property
    def shifts(self) -> Tensor:
        """s_k [K] in (0, 1)."""
        return self.shift_logits.sigmoid()

    def gate(self) -> Tensor | None:
        """Factor [r] of the columns of A; None where there is none."""
        return None

    def current_effective_rank(self) -> int:
        """The rank of A·B: r, or the number of unmasked components."""
        return self.rank

    def forward(
        self, x: Tensor, rank: int | None = None, *, ordered: bool = True, grid: Grid | None = None
    ) -> Factors:
        """A [b, T, r'], B [b, r', D] of x [b, T, D] on `grid`, by default the model's own; r' is
        `rank` or the rank in use, at most min(T, D); masked columns of A are zero.

        One model serves every r' ≤ r: projected factors are cut in Ritz order, direct factors are
        replaced by the truncated SVD of their product. ordered=False leaves the components of an
        uncut model without extra columns as they come, and saves the eigenproblem.
        """
        return self.way.factors(self, x, tuple(grid or self.grid), self.rank_at(x, rank), ordered)

    def rank_at(self, x: Tensor, rank: int | None = None) -> int:
        """The rank at which x [b, T, D] is factored: the one asked for, at most min(T, D)."""
        return min(self.rank_in_use if rank is None else rank, *x.shape[-2:])

    def sketch_columns(self, rank: int | None = None) -> int:
        """Columns of the sketch that are computed for a rank r' ≤ r (None: the rank in use)."""
        rank = self.rank_in_use if rank is None else rank
        return columns_for(rank, self.oversample, self.rank_in_use + self.oversample)

    def sketch(self, x: Tensor, columns: int, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
        """Y ∝ X_s col_net(X_sᵀ)/‖·‖ + g row_net(X_s)/‖·‖ [b, T, c], and row_net's own output.

        X_s: the features that are seen; c = `columns`, at most min(T, D). A linear col_net makes
        X_s X_sᵀ W, a power step on some features: its components fall as σ², those of row_net as σ
        or not at all, so a new one has next to no weight g.
        """
        columns, grid = min(columns, *x.shape[-2:]), tuple(grid or self.grid)
        from_rows, weights = (t.to(x.dtype) for t in self.branch_outputs(x, columns, grid))
        seen = x if weights.shape[-2] == x.shape[-1] else x[..., self.seen]
        return add_sketches(seen @ weights, from_rows, self.row_gain)

    def branch_outputs(self, x: Tensor, columns: int, grid: Grid) -> tuple[Tensor, Tensor]:
        """row_net's output [b, T, c], and col_net's of the n features that are seen [b, n, c]; on
        another grid of all [b, D, c], of which those that are not seen take the linear path."""
        if x.shape[-2:] != (math.prod(grid), self.input_dim):
            raise ValueError(
                f"tokens of {grid[0]} × {grid[1]} positions and {self.input_dim} features are "
                f"expected, not {x.shape[-2]} × {x.shape[-1]}: name their grid"
            )
        seen, tables = x[..., self.seen], self.tables_on(grid, self.col_net)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            from_rows = self.row_net(seen, columns)
            from_columns = functional_call(self.col_net, tables, (seen.mT, columns))
            if not tables:
                return from_rows, from_columns
            if skip := self.col_net.skip:
                straight = F.linear(x.mT, tables["skip.weight"][:columns], skip.bias[:columns])
                return from_rows, straight.index_copy(-2, self.seen, from_columns)
            straight = x.mT @ gaussian(x.shape[-2], columns).to(x)
        own = torch.zeros_like(straight).index_copy(-2, self.seen, from_columns.to(straight.dtype))
        return from_rows, add_sketches(straight, own, 0.1)[0]

    def tables_on(self, grid: Grid, branch: nn.Module, detail: bool = True) -> dict[str, Tensor]:
        """The tensors over positions of col_net, or of a branch like it, on `grid`: none on the
        model's own. detail: a sketch's, `add_detail`. They are made anew for every batch: what is
        kept has to be told of each change of a weight, and a fused optimiser tells of none."""
        if grid == self.grid:
            return {}
        if not self.way.any_grid:
            raise InputError(
                f"direct factors are tied to the grid they were trained on, {self.grid[0]} × "
                f"{self.grid[1]}, not {grid[0]} × {grid[1]}: train with --factors projected"
            )
        own = dict(branch.named_parameters())
        share = self.num_tokens / math.prod(grid)  # T₀/T
        read, held = self.over_positions()
        found = {n: resize_positions(own[n], self.grid, grid, 0) for n in held}
        for name in read:
            table = resize_positions(own[name], self.grid, grid, 1)
            if detail and name == "skip.weight":
                table = add_detail(table, max(0.0, 1 - share))
            found[name] = share * table
        return found

    def see_features(self, seen: Tensor) -> None:
        """Let the branches of projected factors look at these features [n] int64 instead of evenly
        spaced ones, n as many. Where `pivoted_features` chose them from training images,
        the sketch of another image is half as far from the optimum, at the same cost."""
        self.seen.copy_(seen)

    def loss_terms(self, x: Tensor, singular_values: Tensor, grid: Grid | None = None) -> LossTerms:
        """All terms of the loss for x [b, T, D], given its σ [b, min(T, D)] float64."""
        energy = x.double().square().sum((-2, -1))
        found, sketch, row_output = self.way.measure(self, x, tuple(grid or self.grid), energy)
        size = x.shape[-2] * x.shape[-1]
        best = optimum(singular_values, self.current_effective_rank()).square() * energy
        # LayerNorm makes constant tokens zero: an image of them weighs as any other exact one does
        scale = torch.where(energy > OPTIMUM_FLOOR * size, energy, size)
        floor = best.maximum(OPTIMUM_FLOOR * scale)
        gaps = [m.orthogonality() for m in self.modules() if isinstance(m, SVDLinear)]
        component = found.component.mean(0)
        return LossTerms(
            reconstruction=(found.bound / floor).mean(),
            mse=found.error.mean() / size,
            optimum_mse=best.mean() / size,
            B=found.b_squared.mean() / size,
            ortho=activation_orth_regu_A(sketch),
            act=activation_orth_regu_A(row_output),
            lora_ortho=torch.stack(gaps).mean() if gaps else self.row_gain.new_zeros(()),
            # a small image has fewer components
            component_energy=F.pad(component, (0, self.rank_in_use - len(component))),
        )


# ----------------------------------------------------------------- the three architectures
class LowRankProjSymmetric(LowRankFactorModel):
    """ResMLP: a linear layer and residual blocks beside it; without blocks it is linear."""

    def make_branch(self, in_features: int, out_features: int) -> Branch:
        kind = (in_features, self.hidden_dim, self.dropout)
        blocks = [ResidualBlock(*kind) for _ in range(self.num_blocks)]
        skip, head = linear(in_features, out_features), None
        if blocks:
            head = nn.Linear(in_features, out_features, bias=False)
            nn.init.zeros_(head.weight)  # a new branch is linear
        return Branch(nn.Sequential(*blocks), head, skip)

    def over_positions(self) -> tuple[list[str], list[str]]:
        blocks = [f"body.{i}.body" for i in range(self.num_blocks)]
        read = ["skip.weight", *(f"{b}.1.weight" for b in blocks)]
        if blocks:  # without them there is no head beside the skip
            read.append("head.weight")
        held = ("0.weight", "0.bias", "4.weight", "4.bias")  # LayerNorm, and the layer back to T
        return read, [f"{b}.{name}" for b in blocks for name in held]


class LowRankProjMLP(LowRankFactorModel):
    """MLP: plain stacks of Linear with GELU between, two hidden layers."""

    hidden_layers = 2
    layer, weights = staticmethod(linear), ("weight",)

    def make_branch(self, in_features: int, out_features: int) -> Branch:
        widths = [in_features] + [self.hidden_dim] * self.num_blocks
        body: list[nn.Module] = []
        for fan_in, fan_out in zip(widths, widths[1:], strict=False):
            body += [self.layer(fan_in, fan_out), nn.GELU(), nn.Dropout(self.dropout)]
        return Branch(nn.Sequential(*body), self.layer(widths[-1], out_features))

    def over_positions(self) -> tuple[list[str], list[str]]:
        first = "body.0" if self.num_blocks else "head"
        return [f"{first}.{name}" for name in self.weights], []


class AdaptiveLowRankProjAdaLoRA(LowRankProjMLP):
    """AdaLoRA: stacks of SVDLinear and a global gate `lora_E` [r, 1] that a mask can close.

    The mask is a buffer applied in forward: a masked column of A is exactly zero, whatever the
    optimiser does to `lora_E`.
    """

    layer, weights = SVDLinear, ("weight_0", "lora_A")

    def __init__(self, **config) -> None:
        super().__init__(**config)
        self.lora_E = nn.Parameter(torch.ones(self.rank, 1))
        self.register_buffer("rank_mask", torch.ones(self.rank, dtype=torch.bool))
        self.register_buffer("narrowed", torch.zeros((), dtype=torch.bool))
        self._read_mask()
        self.register_load_state_dict_post_hook(lambda module, _: module._read_mask())

    def gate(self) -> Tensor:
        return (self.lora_E * self.rank_mask.unsqueeze(-1)).squeeze(-1)

    def effective_rank_mask(self) -> Tensor:
        """[r] bool: which components are kept."""
        return self.rank_mask

    def current_effective_rank(self) -> int:
        return self._effective_rank

    def set_rank_mask(self, mask: Tensor, final: bool = False) -> None:
        """Keep the components where mask [r] is True; `final` narrows the sketch to k + p columns.

        Only projected factors narrow: there components are in Ritz order and the mask is a prefix.
        """
        self.rank_mask.copy_(mask)
        self.narrowed.fill_(final and self.factors == "projected")
        self._read_mask()

    def _read_mask(self) -> None:
        self._effective_rank = int(self.rank_mask.sum())
        self.rank_in_use = self._effective_rank if self.narrowed else self.rank


ARCHITECTURES: dict[str, type[LowRankFactorModel]] = {
    "ResMLP": LowRankProjSymmetric,
    "MLP": LowRankProjMLP,
    "AdaLoRA": AdaptiveLowRankProjAdaLoRA,
}
_ALIASES = {name.lower(): name for name in ARCHITECTURES} | {"lowrankprojmlp": "MLP"}
_ALIASES |= dict.fromkeys(("symmetric", "lowrankprojsymmetric"), "ResMLP")
_ALIASES |= dict.fromkeys(("adaptive_adalora", "adaptive"), "AdaLoRA")


def canonical_arch(name: str) -> str:
    """The name whose folder results go to, from any alias in any case. Raises InputError."""
    try:
        return _ALIASES[name.lower()]
    except KeyError:
        raise InputError(
            f"--arch {name} is unknown: type one of {', '.join(ARCHITECTURES)} "
            f"(aliases {', '.join(sorted(set(_ALIASES) - {n.lower() for n in ARCHITECTURES}))})"
        ) from None


def get_model_by_name(
    arch: str, *, input_dim: int, num_tokens: int, rank: int, **settings: str | float | Grid | None
) -> LowRankFactorModel:
    """Build a model by its architecture's name or alias; settings as in LowRankFactorModel."""
    shape = {"input_dim": input_dim, "num_tokens": num_tokens, "rank": rank}
    return ARCHITECTURES[canonical_arch(arch)](**shape, **settings)
