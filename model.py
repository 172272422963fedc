"""The factor model: two branches sketch X from its rows and columns, linear algebra does the rest.

Legend: b images in a batch, T tokens, D features, r rank, p extra sketch columns (`oversample`),
c = r + p sketch columns, K refinement steps. X [b, T, D] float32 normalised tokens.

`projected` factors (default): sketch Y → basis Q = orth(Y), refined K times → leading vectors U →
A = U · gate, B = Uᵀ X / (1 + λ_B). `direct` factors: A and B are the branches' outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from branches import Branch, ResidualBlock, ResidualBranch, SVDLinear, base_weight, linear
from common.errors import UserError
from subspace import NORM_FLOOR, columns_for, even_features, refine, start_shifts
from svd_baseline import optimum

OPTIMUM_FLOOR = 1e-6  # of ‖X‖²: below it an image is exact, and its loss is no longer magnified
ROW_GAIN = 1e-4  # what row_net starts with: more of it only blurs a new column sketch


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
    task: Tensor | None = None  # ½ log of a head's loss; train_real_data.py's to fill in


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
        _check_shape(rank, limit, factors, refine_steps, oversample)
        self.input_dim, self.num_tokens, self.rank = input_dim, num_tokens, rank
        self.factors = factors
        self.refine_steps = 1 if refine_steps is None else refine_steps
        self.oversample = min(32, limit - rank) if oversample is None else oversample
        if factors == "direct":
            self.refine_steps = self.oversample = 0
        self.lambda_B = lambda_B
        self.hidden_dim = hidden_dim or 256
        self.num_blocks = self.hidden_layers if num_blocks is None else num_blocks
        self.dropout = dropout
        self.precision = precision
        self.sketch_columns = rank + self.oversample
        # B needs every feature, a sketch does not
        seen = (
            torch.arange(input_dim) if factors == "direct" else even_features(input_dim, num_tokens)
        )
        self.register_buffer("seen", seen)
        self.row_net = self.make_branch(len(seen), self.sketch_columns)
        self.col_net = self.make_branch(num_tokens, self.sketch_columns)
        self.row_gain = nn.Parameter(torch.tensor(ROW_GAIN))
        # sigmoid keeps a shift in (0, 1)
        self.shift_logits = nn.Parameter(start_shifts(self.refine_steps).logit().float())
        if factors == "direct":
            with torch.no_grad():  # A·B starts at the scale of X, and not r times above it
                for branch in (self.row_net, self.col_net):
                    base_weight(branch.output).mul_(rank**-0.25)

    # a checkpoint stores this; `get_model_by_name(**config)` builds the same model
    @property
    def config(self) -> dict:
        names = ("input_dim", "num_tokens", "rank", "factors", "lambda_B", "hidden_dim")
        config = {
            name: getattr(self, name) for name in (*names, "num_blocks", "dropout", "precision")
        }
        if self.factors == "projected":
            config |= {"refine_steps": self.refine_steps, "oversample": self.oversample}
        return {"arch": arch_of(self), **config}

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

    def forward(
        self, x: Tensor, rank: int | None = None, *, ordered: bool = True
    ) -> tuple[Tensor, Tensor]:
        """A [b, T, r'], B [b, r', D] of x [b, T, D]; r' is `rank`, or the trained rank
        (masked columns of A are zero; they are left out once the rank is final).

        One model serves every r' ≤ r: projected factors are cut in Ritz order, direct factors are
        replaced by the truncated SVD of their product. ordered=False leaves the components of an
        uncut model without extra columns as they come, and saves the eigenproblem.
        """
        cut = self.rank_in_use if rank is None else rank
        if self.factors == "direct":
            a, b = self._direct_factors(x)
            return (a, b) if cut == self.rank else truncate_product(a, b, cut)
        gate = self.gate()
        ordered = ordered or gate is not None or cut < self.rank
        sketch = self.sketch(x, self.columns_at(cut))[0]
        space = refine(sketch, x, self.shifts, cut, ordered)
        u = space.u.to(x.dtype)  # [b, T, r']
        b = u.mT @ x / (1 + self.lambda_B)  # [b, r', D], argmin ‖X − U B‖² + λ‖B‖²
        return (u if gate is None else u * gate[:cut]), b

    def columns_at(self, rank: int) -> int:
        """Sketch columns that are computed for rank r' ≤ r (`subspace.columns_for`)."""
        return columns_for(rank, self.oversample, self.sketch_columns)

    def sketch(self, x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Y ∝ X_s col_net(X_sᵀ)/‖·‖ + g row_net(X_s)/‖·‖ [b, T, c], and row_net's own output.

        X_s: the features of X that are seen. c = `columns`, the first ones of the branches'
        outputs. A linear col_net makes X_s X_sᵀ W, a power step on some features: its components
        fall as σ², those of row_net as σ or not at all, so a new one has next to no weight g.
        """
        self._check_input(x)
        seen = x[..., self.seen]  # [b, T, n]
        with self._branch_precision(x):
            from_rows = self.row_net(seen, columns)  # [b, T, c]
            weights = self.col_net(seen.mT, columns)  # [b, n, c]
        from_rows = from_rows.to(x.dtype)
        from_columns = seen @ weights.to(x.dtype)  # [b, T, c]
        # only the span counts: one of the two norms is enough
        ratio = _norm(from_columns) / _norm(from_rows)
        return torch.addcmul(from_columns, from_rows, self.row_gain * ratio), from_rows

    def see_features(self, seen: Tensor) -> None:
        """Let the branches of projected factors look at these features [n] int64 instead of evenly
        spaced ones, n as many. Where `subspace.pivoted_features` chose them from training images,
        the sketch of another image is half as far from the optimum, at the same cost."""
        self.seen.copy_(seen)

    def loss_terms(self, x: Tensor, singular_values: Tensor) -> LossTerms:
        """All terms of the loss for x [b, T, D], given its σ [b, min(T, D)] float64."""
        if self.factors == "direct":
            a, b = self._direct_factors(x)
            bound = (x - a @ b).double().square().sum((-2, -1))
            error = bound.detach()
            energy = x.double().square().sum((-2, -1))
            b_squared = b.double().square().sum((-2, -1))
            columns, row_output = a, a
            component = a.square().sum(-2) * b.square().sum(-1)  # [b, r]
        else:
            columns, row_output = self.sketch(x, self.sketch_columns)
            gate = self.gate()
            ordered = gate is not None
            space = refine(columns, x, self.shifts, self.rank_in_use, ordered)
            # U orthonormal, B = UᵀX/(1+λ), A = U diag(g), without forming A·B:
            # ‖X − A B‖² = ‖X‖² − Σ_i ‖u_iᵀX‖² (1 − (1 − g_i/(1+λ))²), and θ_i ≤ ‖u_iᵀX‖²
            ridge = 1 + self.lambda_B
            g = 1.0 if gate is None else gate[: self.rank_in_use].double()
            energy = x.double().square().sum((-2, -1))
            kept = 1 - (1 - g / ridge) ** 2
            bound = energy - (space.theta * kept).sum(-1)
            b_squared = space.theta.sum(-1) / ridge**2
            with torch.no_grad():
                component = (space.u.mT @ x.double()).square().sum(-1)  # [b, r]
                error = energy - (component * kept).sum(-1)
                component = component / ridge**2
        size = x.shape[-2] * x.shape[-1]
        best = optimum(singular_values, self.current_effective_rank()).square() * energy
        # LayerNorm makes constant tokens zero: an image of them weighs as any other exact one does
        scale = torch.where(energy > OPTIMUM_FLOOR * size, energy, size)
        floor = best.maximum(OPTIMUM_FLOOR * scale)
        return LossTerms(
            reconstruction=(bound / floor).mean(),
            mse=error.mean() / size,
            optimum_mse=best.mean() / size,
            B=b_squared.mean() / size,
            ortho=activation_orth_regu_A(columns),
            act=activation_orth_regu_A(row_output),
            lora_ortho=self.lora_orthogonality(),
            component_energy=component.detach().mean(0),
        )

    @property
    def rank_in_use(self) -> int:
        """Columns that are computed: r, or fewer once a rank allocator has made its rank final."""
        return self.sketch_columns - self.oversample

    def lora_orthogonality(self) -> Tensor:
        """Mean orthogonality gap of all SVDLinear layers; 0 where there are none."""
        gaps = [m.orthogonality() for m in self.modules() if isinstance(m, SVDLinear)]
        return torch.stack(gaps).mean() if gaps else self.shift_logits.new_zeros(())

    def _direct_factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        with self._branch_precision(x):
            a = self.row_net(x, self.rank)  # [b, T, r]
            b = self.col_net(x.mT, self.rank).mT  # [b, r, D]
        a, b = a.to(x.dtype), b.to(x.dtype)
        gate = self.gate()
        return (a if gate is None else a * gate), b

    def _branch_precision(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-2:] != (self.num_tokens, self.input_dim):
            raise UserError(
                f"this model was trained on {self.num_tokens} × {self.input_dim} tokens, the cache "
                f"has {x.shape[-2]} × {x.shape[-1]}: name the cache it was trained on with "
                "--cache_dir"
            )


class LowRankProjSymmetric(LowRankFactorModel):
    """ResMLP: a linear layer and residual blocks beside it; without blocks it is linear."""

    def make_branch(self, in_features: int, out_features: int) -> ResidualBranch:
        blocks = [
            ResidualBlock(in_features, self.hidden_dim, self.dropout)
            for _ in range(self.num_blocks)
        ]
        return ResidualBranch(linear(in_features, out_features), nn.Sequential(*blocks))


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
        self._effective_rank = self.rank
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
        rank = self._effective_rank if self.narrowed else self.rank
        self.sketch_columns = rank + self.oversample


ARCHITECTURES: dict[str, type[LowRankFactorModel]] = {
    "ResMLP": LowRankProjSymmetric,
    "MLP": LowRankProjMLP,
    "AdaLoRA": AdaptiveLowRankProjAdaLoRA,
}
_ALIASES = {
    "symmetric": "ResMLP",
    "lowrankprojsymmetric": "ResMLP",
    "lowrankprojmlp": "MLP",
    "adaptive_adalora": "AdaLoRA",
    "adaptive": "AdaLoRA",
} | {name.lower(): name for name in ARCHITECTURES}


def canonical_arch(name: str) -> str:
    """The name whose folder results go to, from any alias in any case. Raises UserError."""
    try:
        return _ALIASES[name.lower()]
    except KeyError:
        raise UserError(
            f"--arch {name} is unknown: type one of {', '.join(ARCHITECTURES)} "
            f"(aliases {', '.join(sorted(set(_ALIASES) - {n.lower() for n in ARCHITECTURES}))})"
        ) from None


def arch_of(model: LowRankFactorModel) -> str:
    """Canonical name of a model's architecture."""
    return next(name for name, cls in ARCHITECTURES.items() if type(model) is cls)


def get_model_by_name(
    arch: str, *, input_dim: int, num_tokens: int, rank: int, **options
) -> LowRankFactorModel:
    """Build a model by its architecture's name or alias; options as in LowRankFactorModel."""
    cls = ARCHITECTURES[canonical_arch(arch)]
    return cls(input_dim=input_dim, num_tokens=num_tokens, rank=rank, **options)


def truncate_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r' approximation of A·B, factored again: A [b, T, r'], B [b, r', D]."""
    q_a, r_a = torch.linalg.qr(a)
    q_b, r_b = torch.linalg.qr(b.mT)
    u, sigma, vh = torch.linalg.svd(r_a @ r_b.mT)
    cut_b = (sigma[..., :rank, None] * vh[..., :rank, :]) @ q_b.mT
    return q_a @ u[..., :rank], cut_b


def _norm(y: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(y, keepdim=True).clamp_min(NORM_FLOOR)


def _check_shape(
    rank: int, limit: int, factors: str, refine_steps: int | None, oversample: int | None
) -> None:
    if not 1 <= rank <= limit:
        raise UserError(f"--rank {rank} is out of range: type 1 to {limit}, the smaller of T and D")
    if factors not in ("projected", "direct"):
        raise UserError(f"--factors {factors} is unknown: type projected or direct")
    if factors == "direct" and (refine_steps is not None or oversample is not None):
        raise UserError("--factors direct has no refinement: omit --refine_steps and --oversample")
    if refine_steps is not None and refine_steps < 0:
        raise UserError(f"--refine_steps {refine_steps} is out of range: type 0 or more")
    if oversample is not None and not 0 <= oversample <= limit - rank:
        raise UserError(
            f"--oversample {oversample} is out of range: at rank {rank} type 0 to {limit - rank}"
        )
