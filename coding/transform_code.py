"""The codec's transform of the tokens themselves, without factors. In the demo's metric it takes as
many bytes as factors below 300 an image, and up to a tenth more above (validation images).

    code = TransformCodec.load("codecs/demo-saliency.safetensors")
    data = code.encode(raw, grid=(16, 16), step=2.0)
    raw = code.decode(data)

Z = C X P [T, d], as in `codec`, is rounded in units of the step Δ. The level of a coefficient's
table is its own in training images, `coefficients` of the codec's file, less that of Δ, which is
sent; so the same symbols are read on every machine.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from coding.codec import Codec, Factors, Prepared
from coding.entropy import (
    STEPS_AN_OCTAVE,
    decode_symbols,
    encode_symbols,
    varint,
)
from coding.transform import dct, on_grid, rate_rounded
from common.errors import UserError

NONE = np.zeros(0, dtype=np.int64)


class TransformCodec(Codec):
    """`encode` and `decode` by the transform; what is stored as the rank is the last direction in
    which something is left. Raises UserError where the codec's file was not fitted in a metric."""

    stream_formats = (3,)

    def __init__(self, tensors: dict[str, Tensor], info: dict, sha256: str | None = None) -> None:
        super().__init__(tensors, info, sha256)
        if "coefficients" not in tensors:
            raise UserError(
                "--form transform needs a codec fitted in a metric: type --form factors, without "
                "one they take fewer bytes, or make one with experiments.fit_codec --metric"
            )

    def prepare(
        self, raw: Tensor, grid: tuple[int, int], factors: Factors | None = None
    ) -> Prepared:
        z, statistics = self._transformed(raw, grid, factors)
        return Prepared(z, None, None, statistics, grid)

    def encode_prepared(self, prepared: Prepared, step: float) -> bytes:
        z, _, _, statistics, grid = prepared
        step_level = round(STEPS_AN_OCTAVE * math.log2(step))
        levels = self._coefficient_levels(grid, step_level)
        q = rate_rounded((z / step).numpy(), levels)
        count = int(np.flatnonzero(q.any(0)).max(initial=-1)) + 1
        head = encode_symbols(*self._head(statistics, NONE, NONE, grid))
        body = encode_symbols(q[:, :count].ravel(), levels[:, :count].ravel())
        return self._framed(grid, step, count, step_level, varint(len(head)) + head + body)

    def factors(self, data: bytes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raise UserError(
            "coded by its transform, without factors: coding.factor_files.load_factors gives tokens"
        )

    def normalised(self, data: bytes) -> tuple[Tensor, Tensor, Tensor]:
        grid, step, count, step_level = self._checked_header(data)
        symbols, at = self._read_head(data, 0, 0, grid)
        mean, std = self._statistics_of(symbols.reshape(2, -1), grid)
        levels = self._coefficient_levels(grid, step_level)[:, :count]
        q = decode_symbols(data[at:], levels.ravel()).reshape(levels.shape)
        z = torch.from_numpy(q.astype(np.float32)) * step
        return dct(grid).mT @ z @ self._inverse[:, :count].mT, mean, std

    def _coefficient_levels(self, grid: tuple[int, int], step_level: int) -> np.ndarray:
        """[T, d] int64."""
        maps = self.tensors["coefficients"].numpy().astype(np.int64)  # [d, H, W]
        return on_grid(maps, grid).reshape(len(maps), -1).T - step_level
