"""The codec among its rivals: its two forms, coded factors and the tokens' transform.

Legend: T tokens on a grid, D features. A codec that was fitted in a metric gives its name to both.
"""

from __future__ import annotations

from torch import Tensor

from experiments.rivals import Knob, Rival, Statistics, TokenImage
from lowrank_tokens.codec import Codec, Prepared
from lowrank_tokens.grids import Grid
from lowrank_tokens.stream import FACTORS, TRANSFORM

STEPS = (32.0, 22.6, 16.0, 11.3, 8.0, 5.6, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18)


class CodecStatistics(Statistics):
    """LayerNorm's statistics by the codec's own steps, transform, tables and entropy code."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def encode(self, raw: Tensor, grid: Grid) -> bytes:
        return self.codec.statistics.encode(raw, grid)

    def decode(self, data: bytes, grid: Grid) -> tuple[Tensor, Tensor]:
        return self.codec.statistics.decode(data, grid)


class Coded(Rival):
    """Coded factors; the knob is the codec's step Δ. Its name says where the codec has a metric."""

    plain_name, knobs, form = "coded", STEPS, FACTORS

    def __init__(self, codec: Codec, shape: tuple[int, int], statistics: Statistics) -> None:
        super().__init__(shape, statistics)
        self.codec = codec
        self.name = self.plain_name + ("_in_metric" if codec.in_metric else "")

    def prepared(self, image: TokenImage) -> Prepared:
        """Return the image as the codec prepares it, once for all steps."""
        key = f"prepared by {self.codec.identity}"
        if key not in image.__dict__:
            image.__dict__[key] = self.codec.prepare(image.raw, image.grid)
        return image.__dict__[key]

    def encode(self, image: TokenImage, knob: Knob) -> bytes:
        return self.codec.encode_prepared(self.prepared(image), knob, self.form)

    def decode(self, data: bytes, knob: Knob, grid: Grid) -> Tensor:
        return self.codec.decode(data)

    def shared_bytes(self, knob: Knob) -> int:
        return self.codec.form_nbytes(self.form)


class CodedTransform(Coded):
    """The transform form: the tokens' own coefficients Z, without a decomposition."""

    plain_name, knobs, form = "transform", (*STEPS, 0.13), TRANSFORM
