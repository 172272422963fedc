"""The factor model: two branches sketch X from its rows and columns, linear algebra does the rest.

Legend: b images in a batch, T tokens, D features, r rank, p extra sketch columns (`oversample`),
c = r + p sketch columns, K refinement steps. X [b, T, D] float32 normalised tokens.

From top to bottom: layers, the two ways from branches to factors (`ProjectedFactors`,
`DirectFactors`), the model, its three architectures, their names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from subspace import NORM_FLOOR, columns_for, even_features, refine, start_shifts, truncate_product
from svd_baseline import optimum

OPTIMUM_FLOOR = 1e-6  # of ‖X‖²: below it an image is exact, and its loss is no longer magnified
ROW_GAIN = 1e-4  # what row_net starts with: more of it only blurs a new column sketch
Factors = tuple[Tensor, Tensor]  # A [b, T, r], B [b, r, D]


# ------------------------------------------------------------------------- layers of a branch
def linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that keeps the scale of its input: weights N(0, 1/in), bias 0."""
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=in_features**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + W₂ GELU(W₁ LN(x))."""

    def __init__(self, width: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        up, down = linear(width, hidden_dim), linear(hidden_dim, width)
        self.body = nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), nn.Dropout(dropout), down)

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
    """head(body(x)), plus skip(x) where there is one; head may be missing beside a skip.

    Only the first `columns` of the c outputs are computed.
    """

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
        straight = outputs(self.skip, x)
        return straight if self.head is None else straight + outputs(self.head, self.body(x))


# ---------------------------------------------------------- from branches to factors: two ways
class Measured(NamedTuple):
    """A batch's squared errors and what the other terms are of; sums over one image each."""

    bound: Tensor  # [b] float64, ≥ ‖X − A·B‖²: what is trained
    error: Tensor  # [b] float64 ‖X − A·B‖² of A·B as users get it; no gradient
    b_squared: Tensor  # [b] float64 ‖B‖²
    component: Tensor  # [b, r] cost of dropping a component; no gradient
    columns: Tensor  # [b, T, c] sketch Y (direct: A)
    row_output: Tensor  # [b, T, c] of row_net alone


class ProjectedFactors:
    """The branches sketch, linear algebra does the rest: Y → Q = orth(Y), refined K times →
    leading vectors U → A = U · gate, B = Uᵀ X / (1 + λ_B)."""

    @staticmethod
    def factors(model: LowRankFactorModel, x: Tensor, rank: int, ordered: bool) -> Factors:
        gate = model.gate()
        ordered = ordered or gate is not None or rank < model.rank
        sketch = model.sketch(x, model.sketch_columns(rank))[0]
        u = refine(sketch, x, model.shifts, rank, ordered).u.to(x.dtype)  # [b, T, r']
        b = u.mT @ x / (1 + model.lambda_B)  # [b, r', D], argmin ‖X − U B‖² + λ‖B‖²
        return (u if gate is None else u * gate[:rank]), b

    @staticmethod
    def measure(model: LowRankFactorModel, x: Tensor, energy: Tensor) -> Measured:
        columns, row_output = model.sketch(x, model.sketch_columns())
        gate = model.gate()
        space = refine(columns, x, model.shifts, model.rank_in_use, ordered=gate is not None)
        # U orthonormal, B = UᵀX/(1+λ), A = U diag(g), without forming A·B:
        # ‖X − A B‖² = ‖X‖² − Σ_i ‖u_iᵀX‖² (1 − (1 − g_i/(1+λ))²), and θ_i ≤ ‖u_iᵀX‖²
        ridge = 1 + model.lambda_B
        g = 1.0 if gate is None else gate[: model.rank_in_use].double()
        kept = 1 - (1 - g / ridge) ** 2
        bound = energy - (space.theta * kept).sum(-1)
        b_squared = space.theta.sum(-1) / ridge**2
        with torch.no_grad():
            component = (space.u.mT @ x.double()).square().sum(-1)  # [b, r]
            error = energy - (component * kept).sum(-1)
        return Measured(bound, error, b_squared, component / ridge**2, columns, row_output)


class DirectFactors:
    """The branches' outputs are the factors: A = row_net(X) · gate, B = col_net(Xᵀ)ᵀ."""

    @staticmethod
    def factors(model: LowRankFactorModel, x: Tensor, rank: int, ordered: bool = False) -> Factors:
        """Uncut as they come; at a lower rank the truncated SVD of their product."""
        from_rows, from_columns = model.branch_outputs(x, model.rank)  # [b, T, r], [b, D, r]
        a, b, gate = from_rows.to(x.dtype), from_columns.mT.to(x.dtype), model.gate()
        a = a if gate is None else a * gate
        return (a, b) if rank == model.rank else truncate_product(a, b, rank)

    @staticmethod
    def measure(model: LowRankFactorModel, x: Tensor, energy: Tensor) -> Measured:
        a, b = DirectFactors.factors(model, x, model.rank)
        error = (x - a @ b).double().square().sum((-2, -1))
        b_squared = b.double().square().sum((-2, -1))
        component = a.square().sum(-2) * b.square().sum(-1)  # [b, r]
        return Measured(error, error.detach(), b_squared, component.detach(), a, a)


FACTORS = {"projected": ProjectedFactors, "direct": DirectFactors}


# ------------------------------------------------------------------------------- the model
def activation_orth_regu_A(a: Tensor) -> Tensor:
    """‖ÂᵀÂ − I‖_F² / c², mean over images, scalar; Â is a [b, T, c] with columns of unit norm."""
    unit = F.normalize(a, dim=-2, eps=NORM_FLOOR)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return (unit.mT @ unit - eye).square().mean()


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

    Args:
        input_dim, num_tokens: D and T of the cache; another shape is refused by `forward`.
        rank: r ≤ min(T, D).
        factors: "projected" or "direct".
        refine_steps, oversample: K ≥ 0 and p ≥ 0 of projected factors (None: 1, and 32 or what
            min(T, D) allows).
        lambda_B: ridge λ_B of the exact coefficients B.
        hidden_dim, num_blocks: width and number of hidden layers or blocks (None: the class's own).
        dropout: in the branches, while training.
        precision: "float32" or "bf16", of the branches' products; the linear algebra is float64.
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
    ) -> None:
        super().__init__()
        limit = min(num_tokens, input_dim)
        if not 1 <= rank <= limit:
            raise UserError(f"--rank {rank} is out of range: type 1 to {limit} = min(T, D)")
        if factors not in FACTORS:
            raise UserError(f"--factors {factors} is unknown: type projected or direct")
        if factors == "direct" and (refine_steps is not None or oversample is not None):
            raise UserError("--factors direct: omit --refine_steps and --oversample")
        if refine_steps is not None and refine_steps < 0:
            raise UserError(f"--refine_steps {refine_steps} is out of range: type 0 or more")
        most = limit - rank
        if oversample is not None and not 0 <= oversample <= most:
            raise UserError(f"--oversample {oversample}: at rank {rank} type 0 to {most}")
        self.input_dim, self.num_tokens, self.rank = input_dim, num_tokens, rank
        self.rank_in_use = rank  # columns of A that are computed: fewer once a lower rank is final
        self.factors, self.way = factors, FACTORS[factors]
        if factors == "direct":  # B needs every feature, a sketch does not
            self.refine_steps = self.oversample = 0
            self.register_buffer("seen", torch.arange(input_dim))
        else:
            self.refine_steps = 1 if refine_steps is None else refine_steps
            self.oversample = min(32, most) if oversample is None else oversample
            self.register_buffer("seen", even_features(input_dim, num_tokens))
        self.lambda_B = lambda_B
        self.hidden_dim = hidden_dim or 256
        self.num_blocks = self.hidden_layers if num_blocks is None else num_blocks
        self.dropout, self.precision = dropout, precision
        self.row_net = self.make_branch(len(self.seen), self.sketch_columns())
        self.col_net = self.make_branch(num_tokens, self.sketch_columns())
        self.row_gain = nn.Parameter(torch.tensor(ROW_GAIN))
        # sigmoid keeps a shift in (0, 1)
        self.shift_logits = nn.Parameter(start_shifts(self.refine_steps).logit().float())
        if factors == "direct":
            for branch in (self.row_net, self.col_net):
                branch.scale_(rank**-0.25)  # A·B starts at the scale of X, not r times above it

    # a checkpoint stores this; `get_model_by_name(**config)` builds the same model
    @property
    def config(self) -> dict:
        names = ["input_dim", "num_tokens", "rank", "factors", "lambda_B", "hidden_dim"]
        names += ["num_blocks", "dropout", "precision"]
        if self.factors == "projected":
            names += ["refine_steps", "oversample"]
        arch = next(name for name, cls in ARCHITECTURES.items() if type(self) is cls)
        return {"arch": arch, **{name: getattr(self, name) for name in names}}

    def make_branch(self, in_features: int, out_features: int) -> nn.Module:
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

    def forward(self, x: Tensor, rank: int | None = None, *, ordered: bool = True) -> Factors:
        """A [b, T, r'], B [b, r', D] of x [b, T, D]; r' is `rank`, or the trained rank
        (masked columns of A are zero; they are left out once the rank is final).

        One model serves every r' ≤ r: projected factors are cut in Ritz order, direct factors are
        replaced by the truncated SVD of their product. ordered=False leaves the components of an
        uncut model without extra columns as they come, and saves the eigenproblem.
        """
        return self.way.factors(self, x, self.rank_in_use if rank is None else rank, ordered)

    def sketch_columns(self, rank: int | None = None) -> int:
        """Columns of the sketch that are computed for a rank r' ≤ r (None: the rank in use)."""
        rank = self.rank_in_use if rank is None else rank
        return columns_for(rank, self.oversample, self.rank_in_use + self.oversample)

    def sketch(self, x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Y ∝ X_s col_net(X_sᵀ)/‖·‖ + g row_net(X_s)/‖·‖ [b, T, c], and row_net's own output.

        X_s: the features of X that are seen. c = `columns`, the first ones of the branches'
        outputs. A linear col_net makes X_s X_sᵀ W, a power step on some features: its components
        fall as σ², those of row_net as σ or not at all, so a new one has next to no weight g.
        """
        from_rows, weights = self.branch_outputs(x, columns)  # [b, T, c], [b, n, c]
        from_rows = from_rows.to(x.dtype)
        from_columns = x[..., self.seen] @ weights.to(x.dtype)  # [b, T, c]
        # only the span counts: one of the two norms is enough
        norms = (torch.linalg.matrix_norm(y, keepdim=True) for y in (from_columns, from_rows))
        of_columns, of_rows = (norm.clamp_min(NORM_FLOOR) for norm in norms)
        return torch.addcmul(
            from_columns, from_rows, self.row_gain * (of_columns / of_rows)
        ), from_rows

    def branch_outputs(self, x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """row_net's output [b, T, c] and col_net's [b, n, c] on the n features that are seen."""
        if x.shape[-2:] != (self.num_tokens, self.input_dim):
            raise UserError(
                f"this model was trained on {self.num_tokens} × {self.input_dim} tokens, not on "
                f"{x.shape[-2]} × {x.shape[-1]}: name the cache it was trained on with --cache_dir"
            )
        seen = x if self.factors == "direct" else x[..., self.seen]  # [b, T, n]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.row_net(seen, columns), self.col_net(seen.mT, columns)

    def see_features(self, seen: Tensor) -> None:
        """Let the branches of projected factors look at these features [n] int64 instead of evenly
        spaced ones, n as many. Where `subspace.pivoted_features` chose them from training images,
        the sketch of another image is half as far from the optimum, at the same cost."""
        self.seen.copy_(seen)

    def loss_terms(self, x: Tensor, singular_values: Tensor) -> LossTerms:
        """All terms of the loss for x [b, T, D], given its σ [b, min(T, D)] float64."""
        energy = x.double().square().sum((-2, -1))
        found = self.way.measure(self, x, energy)
        size = x.shape[-2] * x.shape[-1]
        best = optimum(singular_values, self.current_effective_rank()).square() * energy
        # LayerNorm makes constant tokens zero: an image of them weighs as any other exact one does
        scale = torch.where(energy > OPTIMUM_FLOOR * size, energy, size)
        floor = best.maximum(OPTIMUM_FLOOR * scale)
        gaps = [m.orthogonality() for m in self.modules() if isinstance(m, SVDLinear)]
        return LossTerms(
            reconstruction=(found.bound / floor).mean(),
            mse=found.error.mean() / size,
            optimum_mse=best.mean() / size,
            B=found.b_squared.mean() / size,
            ortho=activation_orth_regu_A(found.columns),
            act=activation_orth_regu_A(found.row_output),
            lora_ortho=torch.stack(gaps).mean() if gaps else self.row_gain.new_zeros(()),
            component_energy=found.component.mean(0),
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


class LowRankProjMLP(LowRankFactorModel):
    """MLP: plain stacks of Linear with GELU between, two hidden layers."""

    hidden_layers = 2
    layer = staticmethod(linear)

    def make_branch(self, in_features: int, out_features: int) -> Branch:
        widths = [in_features] + [self.hidden_dim] * self.num_blocks
        body: list[nn.Module] = []
        for fan_in, fan_out in zip(widths, widths[1:], strict=False):
            body += [self.layer(fan_in, fan_out), nn.GELU(), nn.Dropout(self.dropout)]
        return Branch(nn.Sequential(*body), self.layer(widths[-1], out_features))


class AdaptiveLowRankProjAdaLoRA(LowRankProjMLP):
    """AdaLoRA: stacks of SVDLinear and a global gate `lora_E` [r, 1] that a mask can close.

    The mask is a buffer applied in forward: a masked column of A is exactly zero, whatever the
    optimiser does to `lora_E`.
    """

    layer = SVDLinear

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
    """The name whose folder results go to, from any alias in any case. Raises UserError."""
    try:
        return _ALIASES[name.lower()]
    except KeyError:
        raise UserError(
            f"--arch {name} is unknown: type one of {', '.join(ARCHITECTURES)} "
            f"(aliases {', '.join(sorted(set(_ALIASES) - {n.lower() for n in ARCHITECTURES}))})"
        ) from None


def get_model_by_name(arch: str, **options) -> LowRankFactorModel:
    """Build a model by its architecture's name or alias; options as in LowRankFactorModel."""
    return ARCHITECTURES[canonical_arch(arch)](**options)
