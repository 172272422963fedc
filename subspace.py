"""The leading left subspace of X from any sketch of it: basis, shifted steps, Nyström finish.

Legend: b images, T tokens, D features, c columns of the sketch, K steps, G = X Xᵀ. The linear
algebra is float64, because G has the squared condition of X, which is beyond float32 on real
tokens. Only products, triangular solves and Choleskys, and one eigenproblem of size c where the
order of the components matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.grids import Grid

NORM_FLOOR = 1e-20  # norms are clamped here, so that zero tokens give zeros and not NaN


# ------------------------------------------------------------------------- orthonormal basis


def _ridged_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor of a Gram matrix with unit diagonal, and kept [..., c]: its independent columns.

    One relative ridge keeps every factorisation alive without a look at its status.
    """
    ridge = 4 * gram.shape[-1] * torch.finfo(gram.dtype).eps
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky_ex(gram + ridge * eye).L
    # the pivot is what is left of a column's squared length outside the columns before it
    return lower, lower.diagonal(dim1=-2, dim2=-1).square() > 100 * ridge


def _cholesky_qr(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: y = q · upper, with dependent columns of q set to zero; kept [..., c] says which.

    Columns are scaled to unit norm first, which takes out the grading of their lengths.
    """
    norm = torch.linalg.vector_norm(y, dim=-2, keepdim=True).clamp_min(NORM_FLOOR)
    z = y / norm
    lower, kept = _ridged_cholesky(z.mT @ z)
    q = torch.linalg.solve_triangular(lower.mT, z, upper=True, left=False)
    return q * kept.unsqueeze(-2), lower.mT * norm, kept


class _Orth(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, passes: int) -> Tensor:
        q, upper, kept = _cholesky_qr(y)
        for _ in range(passes - 1):
            q, upper_next, kept_next = _cholesky_qr(q)
            upper, kept = upper_next @ upper, kept & kept_next
        ctx.save_for_backward(q, upper, kept)
        return q

    @staticmethod
    def backward(ctx, grad_q: Tensor) -> tuple[Tensor, None]:
        # Y = Q R:  dY = (dQ + Q copyltu(−dQᵀQ)) R⁻ᵀ  (Walter & Lehmann 2010), on kept columns only
        q, upper, kept = ctx.saved_tensors
        column = kept.unsqueeze(-2).to(q.dtype)
        grad_q = grad_q * column
        m = -grad_q.mT @ q
        inner = grad_q + q @ (m.tril() + m.tril(-1).mT)
        # a dropped column takes no part: its row and column of R become the identity's
        upper = upper * column * column.mT + torch.diag_embed(1 - column.squeeze(-2))
        grad = torch.linalg.solve_triangular(upper.mT, inner, upper=False, left=False) * column
        return grad, None


def orth(y: Tensor, passes: int = 2) -> Tensor:
    """Orthonormal basis of the columns of y, in their order (the Q of a QR factorisation).

    Args:
        y: [..., T, c], c ≤ T. float64 for real tokens: their Gram matrix is beyond float32.
        passes: 2 is orthonormal to ε; 1 to ε cond², enough for a basis that is refined further.
    Returns: q [..., T, c], same dtype, with qᵀq = I; a column that depends on those before it (to
        about 1e-5 of its length in float64) is exactly zero instead of an arbitrary direction, and
        gets no gradient. The backward stays finite where that of torch.linalg.qr is NaN.
    Method: scaled CholeskyQR2 (Yamamoto et al. 2015; Fukaya et al. 2020). Cost O(T c²), products,
        triangular solves and Cholesky only; no synchronisation with the host.
    """
    return _Orth.apply(y, passes)


# ------------------------------------------------------------------- refinement of a subspace


def start_shifts(steps: int) -> Tensor:
    """Rising shifts s_k = k / (K + 1/3), k = 1 … K, as fractions of the smallest Ritz value.

    Chosen on validation images: 0.75 for one step (0.069 % against 0.102 % with 0.5 at rank 128,
    p = 32), 0.43 and 0.86 for two; without extra columns some smaller shifts are a little better.
    """
    return torch.arange(1, steps + 1, dtype=torch.float64) / (steps + 1 / 3)


FEATURES_SEEN = 256


def even_features(features: int, tokens: int) -> Tensor:
    """[n] int64, n of D features evenly spaced: 256, but no fewer than T, so that they span X."""
    count = min(features, max(FEATURES_SEEN, tokens))
    return torch.arange(count) * features // count


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


def smallest_ritz_estimate(h: Tensor) -> Tensor:
    """Smallest Cholesky pivot of H = QᵀGQ, [..., 1, 1]: an estimate of its smallest eigenvalue.

    Each pivot is what is left of a column's energy outside the columns before it, so the smallest
    bounds the smallest Ritz value from above, more tightly than the diagonal of H does, at c³/3.
    0, no shift, where H is singular (fewer independent tokens than columns). Shifts are learned as
    fractions of this estimate and are right with no other.
    """
    singular = (torch.linalg.cholesky_ex(h.detach()).info != 0)[..., None, None]
    # the identity in place of a singular H, whose factor and gradient would be NaN
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    lower = torch.linalg.cholesky_ex(torch.where(singular, eye, h)).L
    pivot = lower.diagonal(dim1=-2, dim2=-1).square().amin(-1)[..., None, None]
    return torch.where(singular, 0, pivot)


def gram_is_cheaper(tokens: int, features: int, columns: int, products: int) -> bool:
    """Whether products X XᵀQ cost less by a float64 G than as X (XᵀQ), float64 counted twice."""
    with_gram = 2 * tokens * tokens * (features + products * columns)
    return with_gram < products * 2 * tokens * features * columns


def gram_operator(x: Tensor, columns: int, products: int) -> Callable[[Tensor], Tensor]:
    """Q ↦ X XᵀQ [b, T, c] float64, the cheaper way for that many products with c columns.

    Either G = X Xᵀ is formed in float64, or X (XᵀQ) in the precision of X: on a graded basis its
    rounding is ε σ_1 σ_k in direction k, where a float32 G has ε σ_1² in every direction.
    """
    if gram_is_cheaper(*x.shape[-2:], columns, products):
        wide = x.double()
        gram = wide @ wide.mT  # [b, T, T]
        return lambda q: gram @ q
    return lambda q: (x @ (x.mT @ q.to(x.dtype))).double()


def _nystrom_factor(gram_q: Tensor, h: Tensor) -> Tensor:
    """F [b, T, c] with F Fᵀ = GQ H⁻¹ QᵀG, H = QᵀGQ; columns of dependent directions are zero.

    With R the Cholesky factor of H, P = XᵀQ R⁻¹ is an orthonormal basis on the other side of X and
    F = X P. So F Fᵀ = X P Pᵀ Xᵀ: half a step of subspace iteration more than Q, for one solve.
    """
    scale = h.detach().diagonal(dim1=-2, dim2=-1).clamp_min(NORM_FLOOR).rsqrt().unsqueeze(-2)
    unit = scale.mT * h * scale
    kept = _ridged_cholesky(unit.detach())[1].unsqueeze(-2)
    # dependent columns give way to the identity's, so that factor and gradient stay finite
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    lower = _ridged_cholesky(torch.where(kept & kept.mT, unit, eye))[0]
    return torch.linalg.solve_triangular(lower.mT, gram_q * (scale * kept), upper=True, left=False)


class Subspace(NamedTuple):
    """An orthonormal basis of the leading left subspace, largest component first."""

    u: Tensor  # [b, T, k] float64; a column is zero where X has fewer independent tokens
    theta: Tensor  # [b, k] float64, ‖u_iᵀ X P‖²: a lower bound of component i's energy ‖u_iᵀ X‖²


def refine(sketch: Tensor, x: Tensor, shifts: Tensor, columns: int, ordered: bool) -> Subspace:
    """The leading left subspace of X [b, T, D] by shifted subspace iteration from a sketch.

    Q = orth(sketch); K times Q ← orth((G − s_k μ I) Q); then the left singular vectors of X P,
    P = orth(XᵀQ), largest first, cut to `columns` (Halko et al. 2011, sec. 4.5 and 5.5; Nyström).

    Args: sketch [b, T, c], x [b, T, D], shifts [K] in [0, 1), columns ≤ c.
        ordered: False skips the eigenproblem where c == columns and no rank is cut later; the
            subspace is the same, its basis comes in no order.
    Eigenvectors are taken without gradient, which is exact for a sum of leading eigenvalues. On
    CUDA the eigenproblem is the one place that waits for the host (its status is checked there).
    Cost: K + 1 products with G (`gram_operator`), O(T c²) a step, O(c³) for the order.
    """
    times_gram = gram_operator(x, sketch.shape[-1], len(shifts) + 1)
    q = orth(sketch.double(), passes=1)  # [b, T, c]
    gram_q = times_gram(q)
    for shift in shifts.double():
        mu = smallest_ritz_estimate(q.mT @ gram_q)  # [b, 1, 1]
        q = orth(gram_q - shift * mu * q, passes=1)
        gram_q = times_gram(q)  # [b, T, c]
    factor = _nystrom_factor(gram_q, q.mT @ gram_q)  # [b, T, c] X P
    if not ordered and columns == sketch.shape[-1]:
        return Subspace(orth(factor), factor.square().sum(-2))
    h = factor.mT @ factor  # [b, c, c]
    # non-finite weights are found in the loss, an eigensolver would raise instead
    theta, v = (t.flip(-1)[..., :columns] for t in torch.linalg.eigh(h.detach().nan_to_num()))
    if h.requires_grad:
        theta = ((h @ v) * v).sum(-2)  # [b, columns] squared singular values of X P
    rounding = torch.finfo(h.dtype).eps * h.shape[-1] * theta.detach()[..., :1]
    length = torch.where(theta > rounding, theta, torch.inf).sqrt()
    return Subspace(factor @ v / length.unsqueeze(-2), theta)


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


# ------------------------------------------------------------------------------- other grids


def default_grid(tokens: int) -> Grid:
    """The grid of T tokens where none was noted: a square if T is one, else one row."""
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)


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


def gaussian(rows: int, columns: int) -> Tensor:
    """[rows, columns] float32 from N(0, 1) on the CPU, always the same draw."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def add_detail(table: Tensor, share: float) -> Tensor:
    """`table` [n, T] plus white noise of `share` ≥ 0 of its mean square, always the same draw.

    A table interpolated from T₀ to T positions is smooth: of T modes it has T₀. A sketch made with
    it misses what X has in the others, a Gaussian one does not; a share of 1 − T₀ / T fills them.
    """
    noise = gaussian(*table.shape).to(table)
    return table + noise * (share * table.detach().square().mean()).sqrt()


# ------------------------------------------------------------------------- a product's rank


def truncate_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r' approximation of A·B, factored again: A [b, T, r'], B [b, r', D]."""
    q_a, r_a = torch.linalg.qr(a)
    q_b, r_b = torch.linalg.qr(b.mT)
    u, sigma, vh = torch.linalg.svd(r_a @ r_b.mT)
    cut_b = (sigma[..., :rank, None] * vh[..., :rank, :]) @ q_b.mT
    return q_a @ u[..., :rank], cut_b


# -------------------------------------------------- two heads: from a model's branches to factors
# `model` is a model.LowRankFactorModel; T of a grid; energy ‖X‖² [b] float64
Factors = tuple[Tensor, Tensor]  # A [b, T, r], B [b, r, D]
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
            raise UserError(f"--refine_steps {steps} is out of range: type 0 or more")
        most = limit - rank
        if extra is not None and not 0 <= extra <= most:
            raise UserError(f"--oversample {extra}: at rank {rank} type 0 to {most}")
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
            raise UserError("--factors direct: omit --refine_steps and --oversample")
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
