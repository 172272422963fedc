"""The leading left subspace of X from any sketch of it: basis, shifted steps, Nyström finish.

Legend: b images, T tokens, D features, c columns of the sketch, K steps, G = X Xᵀ. The linear
algebra is float64, because G has the squared condition of X, which is beyond float32 on real
tokens. Only products, triangular solves and Choleskys, and one eigenproblem of size c where the
order of the components matters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_tokens.exceptions import InputError

NORM_FLOOR = 1e-20  # norms are clamped here, so that zero tokens give zeros and not NaN


# ------------------------------------------------------------------------- orthonormal basis


def _ridged_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower factor of a Gram matrix with unit diagonal, and kept [..., c].

    kept: its independent columns. One relative ridge keeps every factorisation alive without a
    look at its status.
    """
    ridge = 4 * gram.shape[-1] * torch.finfo(gram.dtype).eps
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky_ex(gram + ridge * eye).L
    # the pivot is what is left of a column's squared length outside the columns before it
    return lower, lower.diagonal(dim1=-2, dim2=-1).square() > 100 * ridge


def _cholesky_qr(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do one pass y = q · upper, with dependent columns of q set to zero; kept [..., c] says which.

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
    """Return an orthonormal basis of the columns of y, in their order (the Q of a QR).

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
    """Return rising shifts s_k = k / (K + 1/3), k = 1 … K, as fractions of the smallest Ritz value.

    Chosen on validation images: 0.75 for one step (0.069 % against 0.102 % with 0.5 at rank 128,
    p = 32), 0.43 and 0.86 for two; without extra columns some smaller shifts are a little better.
    """
    return torch.arange(1, steps + 1, dtype=torch.float64) / (steps + 1 / 3)


def smallest_ritz_estimate(h: Tensor) -> Tensor:
    """Return the smallest Cholesky pivot of H = QᵀGQ, [..., 1, 1], for its smallest eigenvalue.

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
    """Tell if products X XᵀQ cost less by a float64 G than as X (XᵀQ), float64 counted twice."""
    with_gram = 2 * tokens * tokens * (features + products * columns)
    return with_gram < products * 2 * tokens * features * columns


def gram_operator(x: Tensor, columns: int, products: int) -> Callable[[Tensor], Tensor]:
    """Return Q ↦ X XᵀQ [b, T, c] float64, the cheaper way for that many products with c columns.

    Either G = X Xᵀ is formed in float64, or X (XᵀQ) in the precision of X: on a graded basis its
    rounding is ε σ_1 σ_k in direction k, where a float32 G has ε σ_1² in every direction.
    """
    if gram_is_cheaper(*x.shape[-2:], columns, products):
        wide = x.double()
        gram = wide @ wide.mT  # [b, T, T]
        return lambda q: gram @ q
    return lambda q: (x @ (x.mT @ q.to(x.dtype))).double()


def _nystrom_factor(gram_q: Tensor, h: Tensor) -> Tensor:
    """Return F [b, T, c] with F Fᵀ = GQ H⁻¹ QᵀG, H = QᵀGQ; dependent directions give zero columns.

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
    """Refine a sketch to the leading left subspace of X [b, T, D] by shifted subspace iteration.

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


# ------------------------------------------------------------------------- a product's rank


@lru_cache(maxsize=8)
def gaussian(rows: int, columns: int) -> Tensor:
    """Draw [rows, columns] float32 from N(0, 1) on the CPU, always the same draw."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def truncate_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best rank-r' approximation of A·B, factored again: A [b, T, r'], B [b, r', D]."""
    q_a, r_a = torch.linalg.qr(a)
    q_b, r_b = torch.linalg.qr(b.mT)
    u, sigma, vh = torch.linalg.svd(r_a @ r_b.mT)
    cut_b = (sigma[..., :rank, None] * vh[..., :rank, :]) @ q_b.mT
    return q_a @ u[..., :rank], cut_b


Factors = tuple[Tensor, Tensor]  # A [b, T, r], B [b, r, D]


# ---------------------------------------------------------------------------- exact factorisation


def smaller_gram(x: Tensor) -> Tensor:
    """Return X Xᵀ or XᵀX of x [..., T, D], whichever is smaller."""
    return x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x


class GramEigen(NamedTuple):
    """Eigenvalues [..., m] and eigenvectors [..., m, m], in columns, largest first."""

    values: Tensor
    vectors: Tensor


def gram_eigen(x: Tensor) -> GramEigen:
    """Decompose the smaller Gram matrix of x [..., T, D], in its dtype; m = min(T, D)."""
    values, vectors = torch.linalg.eigh(smaller_gram(x))
    return GramEigen(values.flip(-1), vectors.flip(-1))


class LeftSingular(NamedTuple):
    """Left singular vectors u [T, m] and singular values s [m], largest first."""

    u: Tensor
    s: Tensor


def left_singular(x: Tensor) -> LeftSingular:
    """Return the left singular vectors and values of x [T, D] float32, by float64.

    Where D < T a vector whose σ is 0 is not of unit length.
    """
    wide = x.double()
    values, vectors = gram_eigen(wide)
    s = values.clamp_min(0).sqrt()
    u = vectors if x.shape[0] <= x.shape[1] else wide @ vectors / s.clamp_min(1e-12)
    return LeftSingular(u.float(), s.float())


def exact_singular_values(x: Tensor) -> Tensor:
    """Return the singular values of X, largest first, by the float64 Gram matrix.

    Args: x [..., T, D]. Returns: [..., m] float64, m = min(T, D). Cost O(T D m + m³).
    The Gram matrix squares the condition: values below 1e-8 σ_1 are rounding, no more.
    """
    return torch.linalg.eigvalsh(smaller_gram(x.double())).flip(-1).clamp_min(0).sqrt()


def exact_factors(x: Tensor, rank: int, dtype: torch.dtype = torch.float64) -> Factors:
    """Return the optimum A = U_r, B = U_rᵀ X by eigenvectors of X's smaller Gram matrix.

    Args: x [..., T, D], rank r. Cost O(T D m + m³), m = min(T, D); where D < T, U_r is an
    orthonormal basis of X V_r: O(T r²) more.
    dtype: of the eigenproblem. In float32 the Gram matrix squares the condition, which costs a few
    tenths of a per cent of excess on real tokens at rank 128; in float64 it is exact, and the
    cheapest exact method here.
    Raises TypeError where x is no float tensor or rank no whole number, InputError for a rank that
    is not 1 to m and where x is not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x has to be a torch tensor of floats [..., T, D], not {kind}")
    try:
        operator.index(rank)
    except TypeError:
        raise TypeError(f"rank = {rank!r} is no whole number") from None
    if x.ndim < 2 or not 1 <= rank <= min(x.shape[-2:]):
        raise InputError(
            f"rank = {rank} of x {list(x.shape)}: give x [..., T, D] and a rank from 1 to the "
            "smaller of T and D"
        )
    wide = x.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    try:
        vectors = gram_eigen(wide).vectors[..., :rank]
    except torch.linalg.LinAlgError:
        raise InputError("x has NaN or infinite entries, of which there are no factors") from None
    # orthonormal also where σ_i = 0, which a division by σ_i would not be
    u = torch.linalg.qr(wide @ vectors)[0] if tall else vectors
    u = u.to(x.dtype)
    return u, u.mT @ x


def symmetric_power(matrix: Tensor, exponent: float) -> Tensor:
    """Return the power of a symmetric positive definite matrix [..., D, D], symmetric, its dtype.

    M^½ of a task's metric is `symmetric_power(m, 0.5)`, and its inverse has the exponent −0.5.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.pow(exponent).unsqueeze(-2)) @ vectors.mT


# ----------------------------------------------------------------------------------- normalisation

LAYER_NORM_EPS = 1e-6
# the square of a larger one is beyond float32, in which tokens are normalised
LARGEST_FEATURE = 1e15


def normalise(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply LayerNorm over D without affine parameters, the only normalisation of the project.

    Args: features [..., T, D], any float dtype, as cached.
    Returns: x [..., T, D] float32, mean [..., T, 1] and std [..., T, 1] float32, where
        std = (var + 1e-6)^1/2 and features = x · std + mean (`denormalise`).
    """
    features = features.float()
    mean = features.mean(dim=-1, keepdim=True)
    centred = features - mean
    std = (centred.square().mean(dim=-1, keepdim=True) + LAYER_NORM_EPS).sqrt()
    return centred / std, mean, std


def usable_features(features: Tensor) -> Tensor:
    """Find images of features [n, T, D] of finite numbers within ±LARGEST_FEATURE: [n] bool."""
    # by the extremes, infinite or NaN if any number is: a twentieth of isfinite's time on bfloat16
    low, high = features.flatten(1).aminmax(dim=1)
    return (low >= -LARGEST_FEATURE) & (high <= LARGEST_FEATURE)


def denormalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo `normalise`: tokens in the encoder's own units, [..., T, D]."""
    return x * std + mean
