"""What the factor model's two branches are made of: stacks of layers from one side of X to columns.

Legend: c columns of the sketch (or of a factor), `columns` ≤ c of them that are computed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + W₂ GELU(W₁ LN(x))."""

    def __init__(self, width: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width),
            linear(width, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            linear(hidden_dim, width),
        )

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
        self.lora_A = nn.Parameter(torch.randn(k, in_features) / math.sqrt(in_features))
        self.lora_E = nn.Parameter(torch.zeros(k, 1))
        self.lora_B = nn.Parameter(torch.randn(out_features, k) / math.sqrt(out_features))

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
    """A body and a last linear layer, of which only the first `columns` outputs are computed."""

    def __init__(self, body: nn.Sequential, head: nn.Linear | SVDLinear) -> None:
        super().__init__()
        self.body, self.head = body, head

    @property
    def output(self) -> nn.Linear | SVDLinear:
        """The layer that sets the output's scale in a new branch."""
        return self.head

    def forward(self, x: Tensor, columns: int) -> Tensor:
        hidden = self.body(x)
        return F.linear(hidden, self.head.weight[:columns], self.head.bias[:columns])


class ResidualBranch(nn.Module):
    """A linear layer, plus residual blocks and a linear layer after them.

    The last layer starts at zero: a new branch is linear. Without blocks it stays so.
    """

    def __init__(self, skip: nn.Linear, body: nn.Sequential) -> None:
        super().__init__()
        self.skip, self.body = skip, body
        if len(body):
            self.head = nn.Linear(skip.in_features, skip.out_features, bias=False)
            nn.init.zeros_(self.head.weight)

    @property
    def output(self) -> nn.Linear:
        """The layer that sets the output's scale in a new branch."""
        return self.skip

    def forward(self, x: Tensor, columns: int) -> Tensor:
        straight = F.linear(x, self.skip.weight[:columns], self.skip.bias[:columns])
        if not len(self.body):
            return straight
        return straight + F.linear(self.body(x), self.head.weight[:columns])


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that keeps the scale of its input: weights N(0, 1/in), bias 0."""
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=in_features**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def base_weight(layer: nn.Linear | SVDLinear) -> Tensor:
    """The dense weight [out, in] itself, without an adapter's part."""
    return layer.weight_0 if isinstance(layer, SVDLinear) else layer.weight
