"""The leading left subspace of X from any sketch of it: orthonormal basis, shifted refinement.

Legend: b images, T tokens, D features, c columns of the sketch, K steps. All linear algebra here is
float64, because G = X Xᵀ has the squared condition of X, which is beyond float32 on real tokens.
Only products, triangular solves and Choleskys, and one eigenproblem of size c where the order of
the components matters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NORM_FLOOR = 1e-20  # norms are clamped here, so that zero tokens give zeros and not NaN


# ------------------------------------------------------------------------- orthonormal basis


def _cholesky_qr(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: y = q · upper, with dependent columns of q set to zero; kept [..., c] says which.

    Columns are scaled to unit norm first, so that the Gram matrix has a unit diagonal and one
    relative ridge keeps every Cholesky factorisation alive without a look at its status.
    """
    norm = torch.linalg.vector_norm(y, dim=-2, keepdim=True).clamp_min(NORM_FLOOR)
    z = y / norm
    gram = z.mT @ z
    ridge = 4 * y.shape[-1] * torch.finfo(y.dtype).eps
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    lower = torch.linalg.cholesky_ex(gram).L
    # the pivot is what is left of a column's squared length outside the columns before it
    kept = lower.diagonal(dim1=-2, dim2=-1).square() > 100 * ridge
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
    """Rising shifts s_k = k / (K + 1), k = 1 … K, as fractions of the smallest Ritz value."""
    return torch.arange(1, steps + 1, dtype=torch.float64) / (steps + 1)


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


class Subspace(NamedTuple):
    """Ritz pairs of G = X Xᵀ on a refined basis."""

    u: Tensor  # [b, T, k] float64, orthonormal columns, largest Ritz value first
    theta: Tensor  # [b, k] float64, u_iᵀ G u_i = ‖u_iᵀ X‖², energy of component i
    energy: Tensor  # [b] float64, ‖X‖_F² = tr G


def refine(sketch: Tensor, x: Tensor, shifts: Tensor, columns: int, ordered: bool) -> Subspace:
    """Shifted subspace iteration, then Rayleigh–Ritz: the leading left subspace of X.

    Q = orth(sketch); K times Q ← orth((G − s_k μ I) Q); Ritz vectors of QᵀGQ, largest first, cut
    to `columns`. All in float64: G has the squared condition of X.

    Args: sketch [b, T, c], x [b, T, D], shifts [K] in [0, 1), columns ≤ c.
        ordered: False skips the eigenproblem where c == columns and no rank is cut later.
    Eigenvectors are taken without gradient, which is exact for a sum of leading eigenvalues. On
    CUDA the eigenproblem is the one place that waits for the host (its status is checked there).
    Cost: O(T² D) once, O(T² c + T c²) a step, O(c³) for the order.
    """
    x64 = x.double()
    gram = x64 @ x64.mT  # [b, T, T]
    last = len(shifts)
    q = orth(sketch.double(), passes=1 if last else 2)  # [b, T, c]
    gram_q = gram @ q
    for k, shift in enumerate(shifts.double(), start=1):
        mu = smallest_ritz_estimate(q.mT @ gram_q)  # [b, 1, 1]
        q = orth(gram_q - shift * mu * q, passes=1 if k < last else 2)
        gram_q = gram @ q  # [b, T, c]
    if ordered or q.shape[-1] > columns:
        h = q.mT @ gram_q  # [b, c, c]
        # non-finite weights are found in the loss, an eigensolver would raise instead
        v = torch.linalg.eigh(h.detach().nan_to_num())[1].flip(-1)[..., :columns]
        return Subspace(q @ v, ((h @ v) * v).sum(-2), gram.diagonal(dim1=-2, dim2=-1).sum(-1))
    return Subspace(q, (q * gram_q).sum(-2), gram.diagonal(dim1=-2, dim2=-1).sum(-1))
