"""Codec of vision tokens: the bytes of one image's tokens, from what all images share.

    codec = Codec.load("codecs/demo.safetensors")
    data = codec.encode(tokens, (16, 16), error=0.16)   # tokens [T, D] in the encoder's units
    tokens = codec.decode(data)                         # [T, D] float32

X are the tokens after LayerNorm by the statistics that are stored. The 2-D DCT C of its grid on one
side and the KLT P of training tokens on the other make Z = C X P. There are two forms of a stream:

- `factors`: of the SVD Z = U S Vᵀ, σ_k u_k is rounded in units of the step Δ. Q is an orthonormal
  basis of what is left of these columns, and B = QᵀZ is rounded likewise. The level of a
  coefficient's table is i_σ + i_var: σ_k / Δ on the logarithmic grid of `entropy`, and the training
  images' variance of that coefficient in the bucket of k.
- `transform`: Z itself is rounded in units of Δ. The level of a coefficient is the logarithm of its
  standard deviation over training images, less that of Δ.

Levels are integers from end to end, so the same symbols are read on every machine. An image sends
an offset of the levels of each column of A and of B, or of each frequency.

Legend: T tokens on a grid [H, W], D features, d directions kept of the KLT, r rank that Δ leaves.
docs/stream.md specifies streams and the codec file to the bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import operator
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tokens.entropy import (
    CODED_FROM,
    OFFSET_LEVEL,
    SIGMA_LEVEL,
    SymbolReader,
    Tables,
    encode_symbols,
    read_varint,
    unzigzag,
    varint,
    zigzag,
)
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import save_tensors, sha256_file
from lowrank_tokens.grids import MAX_SIDE, Grid
from lowrank_tokens.linalg import LARGEST_FEATURE, normalise, usable_features
from lowrank_tokens.transform import (
    LAMBDA,
    adapted,
    column_bits,
    dct,
    independent,
    inverse_dct,
    leading,
    level_offsets,
    off_grid,
    on_grid,
    orthonormal,
    sigma_levels,
    to_coded,
    to_levels,
    tokens_shift,
)

FORMAT = 1  # of the codec file and of a stream
KIND = "codec"
FORMS = ("factors", "transform")
FACTORS, TRANSFORM = FORMS
EXTREMES = 2  # bit of a stream's first byte: extreme entries follow its header
# 16 · format + bits, first four bytes of the codec's identity, CRC-32 of all other bytes
HEADER = struct.Struct("<B4sI")
STEP_UNITS = 64  # of an octave of Δ: the grid of levels, UNITS to a level
LARGEST_STEP_INDEX = 1024 * STEP_UNITS  # Δ beyond is no float64
MOST_TOKENS = 2**20  # of an image: 14336 pixels square at 14 a token
FINEST, COARSEST = -12 * STEP_UNITS, 14 * STEP_UNITS  # of a search

DROPPED_BELOW = 2.0  # components with σ_k less than this many steps
# Rank by rate: a component is dropped whose squared error is worth less than its bits, and
# COMPONENT_BITS for what else it sends. In a metric this gained nothing.
LAMBDA_A = 0.3
COMPONENT_BITS = 5
DROP_ROUNDS = 3

# An entry of a token is extreme above this share of the token's energy, and that many of its std.
EXTREME_SHARE, EXTREME_STD = 0.1, 8.0
MOST_EXTREME_PASSES = 32

FORM_ARRAYS = {  # what only one form reads
    FACTORS: ("rows", "columns", "starts"),
    TRANSFORM: ("spectrum_left", "spectrum_right"),
}
PROVENANCE = "fitted_images"  # array that no decoding uses

Factors = tuple[Tensor, Tensor, Tensor]  # u [T, r], s [r], v [D, r]


class StreamHeader(NamedTuple):
    """What stands before the symbols of a coded image."""

    form: str
    grid: Grid
    step_index: int
    rank: int  # 0 of the form `transform`
    first: int  # i_σ of the first component
    extremes: tuple[np.ndarray, np.ndarray] | None  # positions t · D + j [n], values [n] float32
    end: int  # byte at which the symbols begin

    @property
    def step(self) -> float:
        """Return Δ in units of normalised tokens."""
        return 2.0 ** (self.step_index / STEP_UNITS)


@dataclass
class Prepared:
    """An image after all that does not depend on the step."""

    z: Tensor  # Z [T, d] float32
    statistics: np.ndarray  # symbols [2, T]
    mean: Tensor  # [T, 1] float32, as decoded from the statistics
    std: Tensor
    grid: Grid
    extremes: bytes = b""

    @cached_property
    def leading(self) -> tuple[Tensor, Tensor]:
        """Return left singular vectors [T, r] and singular values [r] of Z, largest first."""
        return leading(self.z)


@dataclass
class Rounded:
    """The symbols of one image at one step."""

    header: bytes  # behind HEADER
    flags: int
    parts: list[tuple[np.ndarray, np.ndarray]]  # symbols and levels, in reading order
    rank: int
    step_index: int
    factors: tuple[np.ndarray, np.ndarray] = field(default=None)  # symbols of A and of B or Z


class CodedImage(NamedTuple):
    """One image as it is stored."""

    data: bytes
    rank: int
    step: float
    errors: dict[str, float]  # rel_error of X, rel_error_original of the tokens


class Codec:
    """What all images share, and `encode` and `decode` of one image's tokens.

    arrays: klt [D, d] bfloat16 (P); inverse [D, d] bfloat16 (back to tokens; absent where it is P);
        scales [3] float32: steps of the mean and of log std, and the mean of log std; statistics
        [2, H, W] int16; tables int32 and table_sizes int16 (`entropy.Tables`); channel_exponents
        [D] int8 (absent where all are 0: tokens are divided by 2^exponent).
        `factors`: rows [buckets, H, W], columns [buckets, d] int16 and starts [buckets] int16, the
        first component of each bucket. `transform`: spectrum_left [H, W, n] and spectrum_right
        [n, d] int16, whose product is in 1/256 of a unit. Log variances are in 1/16 of a level.
        fitted_images [n, 8] uint8: first bytes of the SHA-256 of images that it was fitted on.
    info: what it was made from: encoder, data, metric, groups.
    sha256: of the file; None before it is saved.
    """

    def __init__(self, arrays: dict[str, Tensor], info: dict, sha256: str | None = None) -> None:
        self.tensors, self.info, self.sha256 = arrays, info, sha256
        self._klt = arrays["klt"].float()
        self._inverse = arrays.get("inverse", arrays["klt"]).float()
        self.in_metric = "inverse" in arrays
        self._scales = arrays["scales"].tolist()
        self._statistics = _integers(arrays["statistics"])
        if "rows" in arrays:
            self._rows, self._columns = _integers(arrays["rows"]), _integers(arrays["columns"])
            self._starts = _integers(arrays["starts"])
        self.tables = Tables(_integers(arrays["tables"]), arrays["table_sizes"].tolist())
        self.feature_dim = len(self._klt)
        exponents = arrays.get("channel_exponents")
        self._channels = None if exponents is None else torch.exp2(exponents.float())  # [D]
        self._maps: dict[Grid, np.ndarray] = {}
        self.identity = arrays_sha256(arrays)

    # ------------------------------------------------------------------------------------- files

    @classmethod
    def load(cls, path: str | Path) -> Codec:
        """Read a file of `save`. Raises InputError where it is missing, damaged or another."""
        remedy = "make one with experiments.fit_codec"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is no codec, or damaged ({error}): {remedy}") from None
        if metadata.get("kind") != KIND or metadata.get("format") != str(FORMAT):
            raise InputError(f"{path} is not a codec of format {FORMAT}: {remedy}")
        info = metadata.get("info", "")
        hashes = arrays_sha256(arrays), provenance_sha256(arrays, info)
        if hashes != (metadata.get("identity"), metadata.get("provenance_sha256")):
            raise InputError(f"{path} is damaged (its content does not match its hash): {remedy}")
        return cls(arrays, json.loads(info), sha256_file(path))

    def other_encoder(self, encoder: dict) -> str | None:
        """Return in words how the encoder that the codec was fitted to differs from this one.

        encoder: a cache's {"id", "weights_sha256"}; what one side does not know is no difference.
        None where they are one.
        """
        own = self.info.get("encoder") or {}
        for key, words in (("id", "encoder"), ("weights_sha256", "encoder weights")):
            fitted, found = own.get(key), encoder.get(key)
            if fitted and found and fitted != found:
                return f"was fitted to {words} {fitted[:40]}, these tokens are of {found[:40]}"
        return None

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the file, whole or not at all, and set `sha256`.

        Raises InputError where another codec is there, unless `overwrite`: bytes that were written
        with that one could not be read any more.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            try:
                found = Codec.load(path).identity
            except InputError:
                found = None
            if found != self.identity:
                what = "something else" if found is None else f"another codec ({found[:8]})"
                raise InputError(f"{path} holds {what}, which would be lost: name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        info = json.dumps(self.info)
        metadata = {"kind": KIND, "format": str(FORMAT), "info": info, "identity": self.identity}
        metadata["provenance_sha256"] = provenance_sha256(self.tensors, info)
        save_tensors(path, self.tensors, metadata)
        self.sha256 = sha256_file(path)

    @property
    def seen(self) -> dict[str, list[str]] | None:
        """Return 16 digits of the hash of each image that it was fitted on, and their groups.

        None where the file does not say.
        """
        hashes = self.tensors.get(PROVENANCE)
        if hashes is None and "groups" not in self.info:
            return None
        digits = [] if hashes is None else [bytes(one).hex() for one in hashes.tolist()]
        return {"image_sha256": digits, "group": self.info.get("groups", [])}

    @property
    def num_directions(self) -> int:
        """Return d, the directions of the KLT that are kept."""
        return self._klt.shape[1]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all arrays that decoding uses."""
        return sum(map(self.form_nbytes, FORMS)) - self._nbytes_of_both

    def form_nbytes(self, form: str) -> int:
        """Return the bytes of the arrays that one form reads."""
        return self._nbytes_of_both + sum(map(self._array_nbytes, FORM_ARRAYS[form]))

    @property
    def _nbytes_of_both(self) -> int:
        own = {PROVENANCE, *FORM_ARRAYS[FACTORS], *FORM_ARRAYS[TRANSFORM]}
        return sum(map(self._array_nbytes, set(self.tensors) - own))

    def _array_nbytes(self, name: str) -> int:
        array = self.tensors.get(name)
        return 0 if array is None else array.numel() * array.element_size()

    # ---------------------------------------------------------------------------------- encoding

    def encode(
        self,
        tokens: Tensor,
        grid: Grid,
        *,
        step: float | None = None,
        error: float | None = None,
        max_bytes: float | None = None,
        form: str = FACTORS,
        factors: Factors | None = None,
    ) -> bytes:
        """Encode one image's tokens; `decode` needs the result and this codec alone.

        Args:
            tokens: [T, D] of any float dtype, finite, in the encoder's own units.
            grid: (rows, columns) with T = rows · columns, tokens in raster order.
            step: Δ > 0 in units of normalised tokens, taken to the nearest 1/64 octave; or
            error: ‖F − F̂‖ / ‖F‖ of the tokens, which is met as nearly as 1 %; or
            max_bytes: the most bytes of the result. One of these three.
            form: "factors" or "transform".
            factors: (u [T, r], s [r], v [D, r]) with X ≈ u diag(s) vᵀ of the normalised `clean`
                tokens, e.g. from a network; None for the exact ones.
        Raises InputError (a ValueError) that names the argument which is wrong, and for a target
        that is out of reach, with the least that can be reached.
        """
        image = coded_image(
            self,
            tokens,
            grid,
            step=step,
            error=error,
            max_bytes=max_bytes,
            form=form,
            factors=factors,
            measured=False,
        )
        return image.data

    def clean(self, tokens: Tensor) -> Tensor:
        """Return tokens [T, D] float32 as the codec normalises them.

        Channels that were far larger than the others in training tokens are scaled down, and
        extreme entries of a token are replaced by the mean of its others.
        """
        return self._without_extremes(self._scaled_down(float_on_cpu(tokens)))[0]

    def _scaled_down(self, tokens: Tensor) -> Tensor:
        return tokens if self._channels is None else tokens / self._channels

    def _without_extremes(self, tokens: Tensor) -> tuple[Tensor, bytes]:
        """Return the tokens without extreme entries, and those entries as bytes."""
        extreme = extreme_entries(tokens)
        if extreme is None:
            return tokens, b""
        others = (~extreme).sum(1, keepdim=True).clamp_min(1)
        mean = tokens.masked_fill(extreme, 0).sum(1, keepdim=True) / others
        positions = extreme.flatten().nonzero().flatten()
        values = tokens.flatten()[positions].to(torch.bfloat16)
        steps = np.diff(positions.numpy(), prepend=0).tolist()
        stored = values.view(torch.int16).numpy().astype("<i2").tobytes()
        section = varint(len(steps)) + b"".join(map(varint, steps)) + stored
        return torch.where(extreme, mean, tokens), section

    def prepare(self, tokens: Tensor, grid: Grid, factors: Factors | None = None) -> Prepared:
        """Do all of `encode` that does not depend on the step; arguments and errors as there."""
        grid = checked_grid(grid)
        check_tokens(tokens, grid, self.feature_dim)
        raw, extremes = self._without_extremes(self._scaled_down(float_on_cpu(tokens)))
        statistics, mean, std = self._round_statistics(raw, grid)
        if factors is None:
            z = self.transformed((raw - mean) / std, grid)
        else:
            u, s, v = map(float_on_cpu, factors)
            # they are of X by the exact statistics; what is stored divides by the rounded ones
            u = u * (normalise(raw)[2] / std)
            z = dct(u * s, grid) @ (v.mT @ self._klt)
        return Prepared(z, statistics, mean, std, grid, extremes)

    def transformed(self, x: Tensor, grid: Grid) -> Tensor:
        """Return Z = C X P [T, d] of normalised tokens [T, D]."""
        return dct(x @ self._klt, grid)

    def of_gradient(self, gradient: Tensor, grid: Grid) -> Tensor:
        """Return the gradient by the decoded Z [T, d] from that by the decoded X [T, D]."""
        return dct(gradient @ self._inverse, grid)

    def encode_prepared(self, prepared: Prepared, step: float, form: str = FACTORS) -> bytes:
        """Return the bytes of a prepared image at one step."""
        return self._written(self._rounded(prepared, step_index(step), form))

    def _rounded(self, prepared: Prepared, index: int, form: str) -> Rounded:
        """Return the symbols at a step of this index."""
        grid, step = prepared.grid, 2.0 ** (index / STEP_UNITS)
        head = varint(grid[0]) + varint(grid[1]) + varint(zigzag(index))
        flags = FORMS.index(form) | EXTREMES * bool(prepared.extremes)
        statistics = prepared.statistics.ravel(), self._statistics_levels(grid)
        if form == TRANSFORM:
            levels = self._transform_levels(index, grid)
            q, offsets = adapted(prepared.z.mT.numpy() / step, levels, self.tables)
            side = side_information([], offsets)
            parts = [statistics, *side, (q.ravel(), to_coded(levels + offsets).ravel())]
            return Rounded(head + prepared.extremes, flags, parts, 0, index, (q, q))
        q_a, q_b, sigma = self._rounded_factors(prepared, step)
        rows, columns = self._row_levels(sigma, grid), self._column_levels(sigma)
        offsets = [level_offsets(q_a, rows, self.tables), level_offsets(q_b, columns, self.tables)]
        first = int(sigma[0]) if len(sigma) else 0
        side = side_information(-np.diff(sigma), *offsets)
        levels = [(rows + offsets[0]).ravel(), (columns + offsets[1]).ravel()]
        body = np.concatenate([q_a.ravel(), q_b.ravel()]), to_coded(np.concatenate(levels))
        head += varint(len(sigma)) + varint(zigzag(first)) + prepared.extremes
        return Rounded(head, flags, [statistics, *side, body], len(sigma), index, (q_a, q_b))

    def _rounded_factors(
        self, prepared: Prepared, step: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the symbols of A [T, r] and B [d, r], and i_σ [r]."""
        (u, s), grid = prepared.leading, prepared.grid
        count = int((s >= DROPPED_BELOW * step).sum())
        sigma = sigma_levels(s[:count], step)
        weight = LAMBDA if self.in_metric else LAMBDA_A
        values = (u[:, :count] * (s[:count] / step)).numpy()
        q_a, _ = adapted(values, self._row_levels(sigma, grid), self.tables, weight)
        for drops_left in reversed(range(DROP_ROUNDS)):
            q_a, sigma, rows = self._kept(q_a, sigma, grid)
            columns = self._column_levels(sigma)
            values = (orthonormal(q_a).mT @ prepared.z / step).mT.numpy()
            q_b, offsets_b = adapted(values, columns, self.tables)
            if self.in_metric or not drops_left:
                break
            gain = (values**2 - (values - q_b) ** 2).sum(0)
            bits = column_bits(q_a, rows, self.tables)
            bits += column_bits(q_b, columns + offsets_b, self.tables) + COMPONENT_BITS
            worth = gain >= LAMBDA * bits
            if worth.all():
                break
            q_a, sigma = q_a[:, worth], sigma[worth]
        return q_a, q_b, sigma

    def _kept(
        self, q_a: np.ndarray, sigma: np.ndarray, grid: Grid
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the independent columns of A's symbols, their i_σ and the levels they are coded
        with. Components move up when others go, so that some symbols may have to become 0."""
        while True:
            keep = independent(q_a)
            q_a, sigma = q_a[:, keep], sigma[keep]
            rows = self._row_levels(sigma, grid)
            rows = rows + level_offsets(q_a, rows, self.tables)
            lost = (to_coded(rows) < CODED_FROM) & (q_a != 0)
            if not lost.any():
                return q_a, sigma, rows
            q_a = np.where(lost, 0, q_a)

    def _written(self, rounded: Rounded) -> bytes:
        first = bytes([16 * FORMAT + rounded.flags]) + bytes.fromhex(self.identity[:8])
        rest = rounded.header + encode_symbols(rounded.parts, self.tables)
        return first + struct.pack("<I", zlib.crc32(rest, zlib.crc32(first))) + rest

    # ---------------------------------------------------------------------------------- decoding

    def factors(self, data: bytes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode a stream of the form `factors`: A [T, r], B [r, D], mean [T] and std [T] float32.

        A·B · std + mean are the tokens as `clean` gives them. Raises InputError where the bytes are
        not those that `encode` gave, are another codec's, or of the form `transform`.
        """
        header = self.header(data)
        if header.form != FACTORS:
            raise InputError(
                "a coded image of the form transform has no factors A and B: decode its tokens"
            )
        statistics, q_a, q_b = self._symbols(data, header)
        mean, std = self._statistics_of(statistics, header.grid)
        a = inverse_dct(orthonormal(q_a), header.grid)
        return a, self._b(q_b, header.step), mean[:, 0], std[:, 0]

    def _b(self, q_b: np.ndarray, step: float) -> Tensor:
        """Return B [r, D] of the symbols [d, r]; directions that no component uses cost nothing."""
        used = q_b.any(1)
        part = torch.from_numpy(q_b[used].T.astype(np.float32)) * step
        return part @ self._inverse[:, torch.from_numpy(used)].mT

    def normalised(self, data: bytes) -> tuple[Tensor, Tensor, Tensor]:
        """Decode X_hat [T, D], mean [T] and std [T] float32 of either form; errors as `decode`."""
        header = self.header(data)
        statistics, *symbols = self._symbols(data, header)
        mean, std = self._statistics_of(statistics, header.grid)
        return self._x_hat(symbols, header.form, header.step, header.grid), mean[:, 0], std[:, 0]

    def _x_hat(self, symbols: Sequence[np.ndarray], form: str, step: float, grid: Grid) -> Tensor:
        if form == FACTORS:
            q_a, q_b = symbols
            return inverse_dct(orthonormal(q_a), grid) @ self._b(q_b, step)
        q = symbols[0]
        used = q.any(1)
        z = torch.from_numpy(q[used].T.astype(np.float32)) * step
        return inverse_dct(z, grid) @ self._inverse[:, torch.from_numpy(used)].mT

    def decode(self, data: bytes) -> Tensor:
        """Decode tokens [T, D] float32, in the encoder's own units, of either form.

        Raises InputError where the bytes are not those that `encode` gave, or are another codec's.
        """
        header = self.header(data)
        statistics, *symbols = self._symbols(data, header)
        mean, std = self._statistics_of(statistics, header.grid)
        x = self._x_hat(symbols, header.form, header.step, header.grid)
        return self.finished(x.mul_(std).add_(mean), header.extremes)

    def _decoded_from(self, rounded: Rounded, prepared: Prepared, form: str) -> Tensor:
        """Return what the bytes of `_written` would decode to."""
        step = 2.0 ** (rounded.step_index / STEP_UNITS)
        x = self._x_hat(rounded.factors, form, step, prepared.grid)
        extremes = read_extremes(prepared.extremes, 0)[0] if prepared.extremes else None
        return self.finished(x.mul_(prepared.std).add_(prepared.mean), extremes)

    def finished(self, tokens: Tensor, extremes: tuple[np.ndarray, np.ndarray] | None) -> Tensor:
        """Put extreme entries back, and scale the channels up."""
        if extremes is not None:
            positions, values = map(torch.from_numpy, extremes)
            tokens.view(-1)[positions.to(tokens.device)] = values.to(tokens.device)
        return tokens if self._channels is None else tokens * self._channels.to(tokens.device)

    def decode_batch(
        self, streams: Sequence[bytes], device: torch.device | str | None = None
    ) -> list[Tensor]:
        """Decode several images: a list of tokens [T_i, D] float32 on `device` (default the CPU).

        Symbols are read on the CPU, products are done on the device, all images of a grid at once.
        Errors as `decode`, naming the position in the list.
        """
        return decode_batch(self, streams, torch.device(device or "cpu"))

    def header(self, data: bytes) -> StreamHeader:
        """Return the header of a stream of this codec.

        Raises InputError where the bytes are damaged, of another format or of another codec.
        """
        header = stream_header(data)
        if data[1:5].hex() != self.identity[:8]:
            raise InputError(
                f"a coded image was written with another codec ({data[1:5].hex()}) than this one "
                f"({self.identity[:8]}): decode it with that one"
            )
        positions = header.extremes[0] if header.extremes else np.zeros(0, dtype=np.int64)
        tokens = math.prod(header.grid)
        fits = header.rank <= min(tokens, self.num_directions)
        if not fits or (positions >= tokens * self.feature_dim).any():
            raise InputError(
                "a coded image is damaged (its rank or its extreme entries do not fit its tokens): "
                "write it again"
            )
        return header

    def _symbols(self, data: bytes, header: StreamHeader) -> list[np.ndarray]:
        """Return the statistics [2, T], and symbols of A [T, r] and B [d, r], or of Z [d, T]."""
        grid, rank = header.grid, header.rank
        reader = SymbolReader(data[header.end :], self.tables)
        tokens = grid[0] * grid[1]
        statistics = reader.read(self._statistics_levels(grid)).reshape(2, tokens)
        if header.form == TRANSFORM:
            offsets = reader.read(np.full(tokens, OFFSET_LEVEL)).cumsum()
            levels = to_coded(self._transform_levels(header.step_index, grid) + offsets)
            return [statistics, reader.read(levels.ravel()).reshape(levels.shape)]
        falls = reader.read(np.full(max(rank - 1, 0), SIGMA_LEVEL))
        offsets = reader.read(np.full(2 * rank, OFFSET_LEVEL)).reshape(2, rank).cumsum(1)
        sigma = header.first - np.concatenate([[0], falls.cumsum()])[:rank]
        rows, columns = self._row_levels(sigma, grid), self._column_levels(sigma)
        levels = [(rows + offsets[0]).ravel(), (columns + offsets[1]).ravel()]
        body = reader.read(to_coded(np.concatenate(levels)))
        split = tokens * rank
        return [
            statistics,
            body[:split].reshape(tokens, rank),
            body[split:].reshape(self.num_directions, rank),
        ]

    # ------------------------------------------------------------------------------------ levels

    def _on_grid(self, name: str, maps: np.ndarray, grid: Grid) -> np.ndarray:
        """Return maps [n, H, W] as they are read on a grid: [n, T], computed once a grid."""
        key = (name, grid)
        if key not in self._maps:
            self._maps[key] = on_grid(maps, grid).reshape(len(maps), -1)
        return self._maps[key]

    def _row_levels(self, sigma: np.ndarray, grid: Grid) -> np.ndarray:
        """Return the levels of σ_k u_k: [T, r]."""
        maps = self._on_grid("rows", self._rows, grid)
        maps = maps + tokens_shift(self._rows.shape[1:], grid)
        return to_levels(maps[self._bucket(len(sigma))].T) + sigma

    def _column_levels(self, sigma: np.ndarray) -> np.ndarray:
        """Return the levels of σ_k v_k: [d, r]."""
        return to_levels(self._columns[self._bucket(len(sigma))].T) + sigma

    def _bucket(self, rank: int) -> np.ndarray:
        return np.searchsorted(self._starts, np.arange(rank), side="right") - 1

    def _transform_levels(self, index: int, grid: Grid) -> np.ndarray:
        """Return the levels of Z / Δ: [d, T]."""
        if "spectrum_left" not in self.tensors:
            raise InputError("this codec has no section for the form transform: fit one with it")
        return to_levels(self._on_grid("spectrum", self._spectrum, grid) - index)

    @cached_property
    def _spectrum(self) -> np.ndarray:
        """Return log standard deviations of Z's coefficients, in UNITS: [d, H, W] int64."""
        left, right = (_integers(self.tensors[f"spectrum_{side}"]) for side in ("left", "right"))
        return np.moveaxis((left @ right) >> 8, 2, 0)

    def _statistics_levels(self, grid: Grid) -> np.ndarray:
        """Return the levels of the statistics' symbols: [2 T]."""
        return to_coded(to_levels(self._on_grid("statistics", self._statistics, grid))).ravel()

    # -------------------------------------------------------------------------------- statistics

    def encode_statistics(self, tokens: Tensor, grid: Grid) -> bytes:
        """Return LayerNorm's statistics of tokens [T, D] as bytes, as streams hold them."""
        symbols, _, _ = self._round_statistics(tokens.float(), grid)
        return encode_symbols([(symbols.ravel(), self._statistics_levels(grid))], self.tables)

    def decode_statistics(self, data: bytes, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return mean and std [T, 1] float32 from `encode_statistics`' bytes."""
        symbols = SymbolReader(data, self.tables).read(self._statistics_levels(grid))
        return self._statistics_of(symbols.reshape(2, -1), grid)

    def _round_statistics(self, raw: Tensor, grid: Grid) -> tuple[np.ndarray, Tensor, Tensor]:
        """Return symbols [2, T] of LayerNorm's mean and log std, and mean and std [T, 1] as
        decoded."""
        symbols = (statistics_dct(raw, grid, self._scales)).round().to(torch.int64).numpy()
        symbols[to_coded(self._statistics_levels(grid)).reshape(2, -1) < CODED_FROM] = 0
        return symbols, *self._statistics_of(symbols, grid)

    def _statistics_of(self, symbols: np.ndarray, grid: Grid) -> tuple[Tensor, Tensor]:
        mean_step, log_step, log_std = self._scales
        steps = torch.tensor([[mean_step], [log_step]])
        mean, log = inverse_dct((torch.from_numpy(symbols).float() * steps).mT, grid).mT
        return mean[:, None], (log + log_std).exp()[:, None]

    # ----------------------------------------------------------------------------------- fitting

    @classmethod
    def fit(
        cls,
        batches: Callable[[], Iterable[tuple[Tensor, Grid]]] | Iterable[tuple[Tensor, Grid]],
        *,
        grid: Grid | None = None,
        metric: Tensor | None = None,
        info: dict | None = None,
        image_hashes: Sequence[str] = (),
    ) -> Codec:
        """Fit a codec to training images, which are read two or three times.

        Args:
            batches: pairs of raw tokens [b, T, D] and their grid; a list or another iterable that
                begins anew each time, or a function that returns one.
            grid: of the tables; default the first batch's. Others are mapped onto it by frequency.
            metric: M [D, D]; the codec then makes the error of X M^½ small.
            info: what the file says of its origin, JSON.
            image_hashes: SHA-256 of the images, hexadecimal; their first 8 bytes are kept.
        Raises TypeError where `batches` can be read only once, InputError where they are empty.
        """
        if iter_once(batches):
            raise TypeError("batches can be read only once: give a list, or a function")
        again = batches if callable(batches) else lambda: batches
        return fit(again, grid, metric, info, image_hashes)


def _integers(array: Tensor) -> np.ndarray:
    return array.numpy().astype(np.int64)


def iter_once(batches: object) -> bool:
    """Return whether an iterable ends after it was read once, as generators do."""
    return not callable(batches) and iter(batches) is batches


def float_on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor as float32 on the CPU, where symbols are made, outside any gradient."""
    return tensor.detach().to("cpu", torch.float32)


def checked_grid(grid: Sequence[int]) -> Grid:
    """Return (rows, columns) of any sequence. Raises InputError where it is no grid of tokens."""
    try:
        rows, columns = map(operator.index, grid)
    except (TypeError, ValueError):
        raise InputError(f"grid = {grid!r} is not (rows, columns) in whole numbers") from None
    return rows, columns


def is_grid(grid: Grid) -> bool:
    """Return whether rows and columns are those of an image that can be coded."""
    return 0 < min(grid) <= max(grid) <= MAX_SIDE and math.prod(grid) <= MOST_TOKENS


def check_tokens(tokens: Tensor, grid: Grid, feature_dim: int) -> None:
    """Raise TypeError or InputError, naming the argument, where tokens cannot be encoded."""
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        raise TypeError(f"tokens have to be a torch tensor of floats, not {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.shape[1] != feature_dim:
        raise InputError(
            f"tokens {list(tokens.shape)} are not [T, {feature_dim}], as the codec's: give one "
            "image's tokens, or fit a codec on a cache of this encoder"
        )
    if not is_grid(grid) or grid[0] * grid[1] != len(tokens):
        raise InputError(f"a grid of {grid[0]} x {grid[1]} does not fit {len(tokens)} tokens")
    if not usable_features(tokens[None]).all():
        raise InputError(
            f"tokens have NaN or infinite entries, or some above {LARGEST_FEATURE:.0e}: leave the "
            "image out, or look at its encoder"
        )


def extreme_entries(tokens: Tensor) -> Tensor | None:
    """Return which entries of tokens [T, D] are extreme, [T, D] bool; None where none is.

    An entry is extreme where it alone has EXTREME_SHARE of its token's energy about the mean, and
    is EXTREME_STD from it, all without those that were found before.
    """
    threshold = max(EXTREME_SHARE * tokens.shape[1], EXTREME_STD**2)
    found = None
    for _ in range(MOST_EXTREME_PASSES):
        kept = tokens if found is None else tokens.masked_fill(found, 0)
        count = tokens.shape[1] if found is None else (~found).sum(1, keepdim=True)
        centred = kept - kept.sum(1, keepdim=True) / count
        if found is not None:
            centred.masked_fill_(found, 0)
        square = centred.square_()
        energy = square.sum(1, keepdim=True)
        if found is None and not (square.amax(1) > threshold / count * energy[:, 0]).any():
            return None
        more = (square > threshold / count * energy) & (energy > 0)
        if not more.any():
            break
        found = more if found is None else found | more
    return found


def side_information(
    falls: np.ndarray | list, *offsets: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return symbols and levels of differences of i_σ, where there are some, and of offsets."""
    steps = np.concatenate([np.diff(o, prepend=0) for o in offsets])  # neighbours are much alike
    parts = [(np.asarray(falls, dtype=np.int64), np.full(len(falls), SIGMA_LEVEL))]
    return parts + [(steps, np.full(len(steps), OFFSET_LEVEL))]


def step_index(step: float) -> int:
    """Return the index of the nearest step 2^(i / 64). Raises InputError where it is not > 0."""
    return round(STEP_UNITS * math.log2(positive_number("step", step)))


def positive_number(name: str, value: float | np.number | Tensor) -> float:
    """Return a number of Python, numpy or a tensor of one entry as a float.

    Raises InputError, naming the argument, where it is no number, not finite or not above 0.
    """
    scalar = isinstance(value, Tensor | np.ndarray) and value.ndim == 0
    number = float(value) if scalar or isinstance(value, numbers.Real) else math.nan
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name} = {value!r} is not a finite number above 0")
    return number


def stream_header(data: bytes) -> StreamHeader:
    """Return the header of a stream of any codec.

    Raises InputError where the bytes are damaged or of another format.
    """
    if len(data) < HEADER.size or data[0] >> 4 != FORMAT:
        raise InputError("a coded image is damaged, or of another format: write it again")
    if zlib.crc32(data[HEADER.size :], zlib.crc32(data[:5])) != HEADER.unpack_from(data)[2]:
        raise InputError("a coded image is damaged (its checksum differs): write it again")
    form = FORMS[data[0] & 1]
    height, at = read_varint(data, HEADER.size)
    width, at = read_varint(data, at)
    index, at = read_varint(data, at)
    if not is_grid((height, width)):
        raise InputError(
            f"a coded image is damaged (its grid is {height} x {width} tokens): write it again"
        )
    if abs(unzigzag(index)) > LARGEST_STEP_INDEX:
        raise InputError("a coded image is damaged (its step is no number): write it again")
    rank = first = 0
    if form == FACTORS:
        rank, at = read_varint(data, at)
        first, at = read_varint(data, at)
    extremes = None
    if data[0] & EXTREMES:
        extremes, at = read_extremes(data, at)
    return StreamHeader(form, (height, width), unzigzag(index), rank, unzigzag(first), extremes, at)


def read_extremes(data: bytes, at: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Read positions [n] and values [n] of extreme entries from byte `at`, and where they end."""
    count, at = read_varint(data, at)
    steps = []
    for _ in range(count):
        step, at = read_varint(data, at)
        steps.append(step)
    if at + 2 * count > len(data) or sum(steps) >= 2**62:
        raise InputError(
            "a coded image is damaged (its extreme entries do not end): write it again"
        )
    bits = np.frombuffer(data, "<u2", count, at).astype(np.uint32) << 16
    positions = np.cumsum(np.array(steps, dtype=np.int64))
    return (positions, bits.view(np.float32)), at + 2 * count


def grid_of(data: bytes) -> Grid:
    """Return rows and columns of a coded image's tokens; errors as `stream_header`."""
    return stream_header(data).grid


def arrays_sha256(arrays: dict[str, Tensor]) -> str:
    """Return a codec's identity: SHA-256 of the format and of the arrays that decoding uses."""
    digest = hashlib.sha256(f"lowrank_tokens codec {FORMAT}".encode())
    for name in sorted(set(arrays) - {PROVENANCE}):
        _add_array(digest, name, arrays[name])
    return digest.hexdigest()


def provenance_sha256(arrays: dict[str, Tensor], info: str) -> str:
    """Return SHA-256 of what a codec was made from."""
    digest = hashlib.sha256(info.encode())
    if PROVENANCE in arrays:
        _add_array(digest, PROVENANCE, arrays[PROVENANCE])
    return digest.hexdigest()


def _add_array(digest: hashlib._Hash, name: str, array: Tensor) -> None:
    digest.update(f"{name} {array.dtype} {list(array.shape)}".encode())
    digest.update(array.contiguous().flatten().view(torch.uint8).numpy())


def statistics_dct(raw: Tensor, grid: Grid, scales: Sequence[float]) -> Tensor:
    """Return the DCT of LayerNorm's mean and log std of tokens, in their steps: [2, T]."""
    mean_step, log_step, log_std = scales
    _, mean, std = normalise(raw)
    both = torch.cat([mean / mean_step, (std.log() - log_std) / log_step], dim=1)  # [T, 2]
    return dct(both, grid).mT


# ------------------------------------------------------------------------------ several at once


def decode_batch(codec: Codec, streams: Sequence[bytes], device: torch.device) -> list[Tensor]:
    """Decode as `Codec.decode_batch` says."""
    headers, read = [], []
    for i, data in enumerate(streams):
        try:
            headers.append(codec.header(data))
            read.append(codec._symbols(data, headers[-1]))
        except InputError as error:
            raise InputError(f"streams[{i}]: {error}") from None
    kinds: dict[tuple[str, Grid], list[int]] = {}
    for i, header in enumerate(headers):
        kinds.setdefault((header.form, header.grid), []).append(i)
    tokens: list[Tensor | None] = [None] * len(streams)
    for (form, grid), places in kinds.items():
        for at in range(0, len(places), IMAGES_AT_ONCE):
            some = places[at : at + IMAGES_AT_ONCE]
            steps = [headers[i].step for i in some]
            x = _x_hat_batch(codec, [read[i][1:] for i in some], form, steps, grid, device)
            for one, i in zip(x, some, strict=True):
                mean, std = (t.to(device) for t in codec._statistics_of(read[i][0], grid))
                tokens[i] = codec.finished(one * std + mean, headers[i].extremes)
    return tokens


def _x_hat_batch(
    codec: Codec,
    symbols: list[list[np.ndarray]],
    form: str,
    steps: list[float],
    grid: Grid,
    device: torch.device,
) -> Tensor:
    """Return X_hat [n, T, D] of images of one grid and form."""
    inverse = codec._inverse.to(device)
    last = [s[-1] for s in symbols]  # [d, r] or [d, T] each
    used = np.flatnonzero(np.logical_or.reduce([q.any(1) for q in last]))
    columns = inverse[:, torch.from_numpy(used).to(device)].mT
    scaled = [
        torch.from_numpy(q[used].T.astype(np.float32)) * s for q, s in zip(last, steps, strict=True)
    ]
    sizes = [len(part) for part in scaled]
    parts = (torch.cat(scaled).to(device) @ columns).split(sizes)  # one product for all images
    if form == TRANSFORM:
        return inverse_dct(torch.stack(parts), grid)
    bases = [orthonormal(q[0]) for q in symbols]
    a = inverse_dct(torch.cat(bases, dim=1).to(device), grid).split(sizes, dim=1)
    return torch.stack([left @ right for left, right in zip(a, parts, strict=True)])


# --------------------------------------------------------------------------------------- fitting


def fit(
    batches: Callable[[], Iterable[tuple[Tensor, Grid]]],
    grid: Grid | None,
    metric: Tensor | None,
    info: dict | None,
    image_hashes: Sequence[str],
) -> Codec:
    """Fit as `Codec.fit` says."""
    first = next(iter(batches()), None)
    if first is None or not len(first[0]):
        raise InputError("batches: there are no training images to fit a codec on")
    grid = grid or first[1]
    exponents, moments = None, _moments(batches, None, metric)
    ratio = (moments.channel_roots / moments.channel_roots.median().clamp_min(1e-30)).log2() * 2
    if (large := ratio > LARGE_CHANNEL).any():
        exponents = torch.where(large, ratio.round(), 0).clamp(-126, 126)
        moments = _moments(batches, torch.exp2(exponents).float(), metric)
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(moments.total))
    outside = values.clamp_min(0).flip(0).cumsum(0).flip(0) / values.clamp_min(0).sum()
    # few training tokens do not span those to come: then all directions are kept, and the energy
    # that others have in them is guessed (25 images of the demo: 24 % fewer bytes)
    unseen = max(0.0, 1 - moments.tokens / (ENOUGH * len(moments.total))) ** 2
    if not unseen:
        vectors = vectors[:, outside > TAIL]
    root, inverse_root = moments.roots
    klt = {"klt": vectors if root is None else root @ vectors}
    if root is not None:
        klt["inverse"] = inverse_root @ vectors
    arrays = {name: t.to(torch.bfloat16).contiguous() for name, t in klt.items()}
    scale = math.exp(moments.log_std)  # of the training tokens: steps are relative to it
    arrays["scales"] = torch.tensor([MEAN_STEP * scale, LOG_STD_STEP, moments.log_std])
    if exponents is not None:
        arrays["channel_exponents"] = exponents.to(torch.int8)
    tables = Tables.of_mixture()
    arrays["tables"] = torch.from_numpy(tables.frequencies.astype(np.int32))
    arrays["table_sizes"] = torch.tensor(tables.sizes, dtype=torch.int16)
    if image_hashes:
        hashes = [list(bytes.fromhex(one[:16])) for one in image_hashes]
        arrays[PROVENANCE] = torch.tensor(hashes, dtype=torch.uint8)
    floor = UNSEEN_ENERGY * unseen / len(moments.total)
    made = (info or {}) | {"images": moments.images}
    arrays |= _variances(batches, arrays, grid, floor)
    return Codec(arrays, made)


IMAGES_AT_ONCE = 32  # of a batch that is decoded
# Coarse: X is normalised by what is stored, so that factors carry what the steps lose. The mean's
# is a share of the training tokens' geometric mean std.
MEAN_STEP, LOG_STD_STEP = 0.025, 0.3
BUCKETS = 16
UNSEEN_ENERGY = 0.05  # of a v_k outside the span of few training tokens
ENOUGH = 32  # training tokens a feature, from which on they are taken to span those to come
TAIL = 1e-5  # energy of training tokens outside the directions that are kept
LARGE_CHANNEL = 4.0  # octaves above the median size of channels, from which on one is scaled down
SPECTRUM_TERMS = 4  # of the transform's map of levels


@dataclass
class Moments:
    """Sums over training images."""

    total: Tensor  # Σ x xᵀ over tokens, of X M^½ where there is a metric, [D, D] float64
    channel_roots: Tensor  # Σ |f − mean|^½ of each channel, which few extreme entries hardly move
    log_std: float  # mean over images
    images: int
    tokens: int
    roots: tuple[Tensor | None, Tensor | None]  # M^½ and M^-½ float64


def _moments(
    batches: Callable[[], Iterable[tuple[Tensor, Grid]]],
    channels: Tensor | None,
    metric: Tensor | None,
) -> Moments:
    if metric is not None and channels is not None:  # tokens that are scaled down weigh more
        metric = channels.double() * metric.double().cpu() * channels.double()[:, None]
    root, inverse_root = _roots(metric)
    total, roots, log_std, images, tokens = 0.0, 0.0, 0.0, 0, 0
    for raw, _ in batches():
        raw = raw.float()
        raw = raw if channels is None else raw / channels.to(raw)
        centred = raw - raw.mean(-1, keepdim=True)
        roots = roots + centred.abs().sqrt().sum((0, 1), dtype=torch.float64).cpu()
        x, _, std = normalise(_all_without_extremes(raw))
        x = x.flatten(0, 1)
        x = x if root is None else x @ root.to(x)
        total = total + (x.mT @ x).double().cpu()
        log_std += float(std.log().mean()) * len(raw)
        images += len(raw)
        tokens += len(x)
    if not torch.isfinite(total).all():
        raise InputError("batches: training tokens are not finite")
    return Moments(total, roots, log_std / images, images, tokens, (root, inverse_root))


def _all_without_extremes(raw: Tensor) -> Tensor:
    """Return tokens [b, T, D] with the extreme entries replaced by their tokens' means."""
    extreme = extreme_entries(raw.flatten(0, 1))
    if extreme is None:
        return raw
    others = (~extreme).sum(1, keepdim=True).clamp_min(1)
    flat = raw.flatten(0, 1)
    mean = flat.masked_fill(extreme, 0).sum(1, keepdim=True) / others
    return torch.where(extreme, mean, flat).view_as(raw)


def _roots(metric: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if metric is None:
        return None, None
    values, vectors = torch.linalg.eigh(metric.double().cpu())
    return (vectors * values.sqrt()) @ vectors.mT, (vectors / values.sqrt()) @ vectors.mT


def bucket_starts(rank: int) -> list[int]:
    """Return the first component of each bucket, at most BUCKETS, geometric in k."""
    edges = {round(rank ** (i / BUCKETS)) - 1 for i in range(BUCKETS)}
    return sorted(edges)


def _variances(
    batches: Callable[[], Iterable[tuple[Tensor, Grid]]],
    arrays: dict[str, Tensor],
    grid: Grid,
    floor: float,
) -> dict[str, Tensor]:
    """Return log variances of u_k and v_k, a bucket of k each, of the statistics in their steps,
    and of Z."""
    klt, scales = arrays["klt"].float(), arrays["scales"].tolist()
    channels = arrays.get("channel_exponents")
    tokens, width = grid[0] * grid[1], klt.shape[1]
    rank = min(tokens, width)
    starts = bucket_starts(rank)
    bounds = list(zip(starts, [*starts[1:], rank], strict=True))
    rows, columns = torch.zeros(len(starts), tokens), torch.zeros(len(starts), width)
    statistics, energy = torch.zeros(2, tokens), torch.zeros(width, tokens)
    counted = torch.zeros(len(starts), 1)  # images that have components of a bucket
    images = 0
    for batch, own in batches():
        longer = own[0] * own[1] / tokens
        for raw in batch.float().cpu():
            raw = raw if channels is None else raw / torch.exp2(channels.float())
            raw = _all_without_extremes(raw[None])[0]
            z = dct(normalise(raw)[0] @ klt, own)
            u, s = leading(z)
            u, s = u[:, :rank], s[:rank]
            v = z.mT @ u / s.clamp_min(1e-6 * s[0])
            there = [(a, b) for a, b in bounds if a < len(s)]
            squares = torch.stack([u[:, a:b].square().mean(1) for a, b in there])
            rows[: len(there)] += longer * off_grid(squares, own, grid)
            columns[: len(there)] += torch.stack([v[:, a:b].square().mean(1) for a, b in there])
            counted[: len(there)] += 1
            statistics += off_grid(statistics_dct(raw, own, scales).square(), own, grid)
            energy += off_grid(z.square().mT, own, grid)
            images += 1

    def octaves(total: Tensor, count: Tensor | int) -> Tensor:
        return (total / count).double().clamp_min(1e-12).log2() / 2

    def levels(total: Tensor, count: Tensor | int) -> Tensor:
        return (octaves(total, count) * STEP_UNITS).round().to(torch.int16)

    left, right = _low_rank(octaves(energy.mT, images) * STEP_UNITS)
    return {
        "rows": levels(rows, counted).reshape(-1, *grid),
        "columns": levels(columns + (floor * counted.double()).float(), counted),
        "statistics": levels(statistics, images).reshape(2, *grid),
        "starts": torch.tensor(starts, dtype=torch.int16),
        "spectrum_left": left.reshape(*grid, -1),
        "spectrum_right": right,
    }


def _low_rank(units: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a map of levels [T, d] into int16 [T, n] and [n, d], whose product is in 1/256."""
    u, s, vh = torch.linalg.svd(units, full_matrices=False)
    n = min(SPECTRUM_TERMS, len(s))
    root = 16 * s[:n].sqrt()
    both = u[:, :n] * root, root[:, None] * vh[:n]
    return tuple(part.round().to(torch.int16).contiguous() for part in both)


# ------------------------------------------------------------------- one image, for a target


SECANTS, TRIES = 3, 8  # steps of a search
GUESS_SHARE = 0.5
CLOSE = 0.01  # a target is met as nearly as this at once, n times this at the n-th try


def coded_image(
    codec: Codec,
    tokens: Tensor,
    grid: Grid,
    *,
    step: float | None = None,
    error: float | None = None,
    max_bytes: float | None = None,
    form: str = FACTORS,
    factors: Factors | None = None,
    measured: bool = True,
) -> CodedImage:
    """Encode one image as `Codec.encode`, and measure the errors of what the bytes decode to.

    measured: False leaves `errors` empty.
    """
    targets = {"step": step, "error": error, "max_bytes": max_bytes}
    named = [name for name, value in targets.items() if value is not None]
    if len(named) != 1:
        raise InputError(
            f"give one of step, error and max_bytes, not {' and '.join(named) or 'none'}"
        )
    if form not in FORMS:
        raise InputError(f"form = {form!r} is not one of {', '.join(FORMS)}")
    value = positive_number(named[0], targets[named[0]])
    prepared = codec.prepare(tokens, grid, factors)
    if step is not None:
        rounded = codec._rounded(prepared, step_index(value), form)
        data = codec._written(rounded)
    elif error is not None:
        rounded = _for_error(codec, prepared, tokens, value, form)
        data = codec._written(rounded)
    else:
        rounded, data = _for_bytes(codec, prepared, value, form)
    errors = measured_errors(codec, tokens, data) if measured else {}
    return CodedImage(data, rounded.rank, 2.0 ** (rounded.step_index / STEP_UNITS), errors)


class Tried(NamedTuple):
    """One step of a search: what came out, and whether it meets the target."""

    position: int  # grows with the wanted quantity
    value: float  # log of error or bytes, which grows with the position
    result: tuple


def _for_error(
    codec: Codec, prepared: Prepared, tokens: Tensor, error: float, form: str
) -> Rounded:
    """Return the symbols at the coarsest step found with which the error is met."""
    tokens = float_on_cpu(tokens)
    norm = float(tokens.double().norm())

    def at(index: int) -> Tried:
        rounded = codec._rounded(prepared, index, form)
        decoded = codec._decoded_from(rounded, prepared, form)
        off = float((tokens - decoded).double().norm()) / max(norm, 1e-300)
        return Tried(index, math.log(max(off, 1e-12)), (rounded,))

    found, least = _search(at, math.log(error), guessed_index(prepared.z, error), FINEST)
    if found is None:
        least = math.ceil(math.exp(least) * 1e4) / 1e4
        raise InputError(f"error = {error:g} is out of reach, the least is {least:.4f}")
    return found.result[0]


def _for_bytes(
    codec: Codec, prepared: Prepared, max_bytes: float, form: str
) -> tuple[Rounded, bytes]:
    """Return the symbols and the bytes at the finest step found whose bytes are few enough."""

    def at(position: int) -> Tried:
        rounded = codec._rounded(prepared, -position, form)
        data = codec._written(rounded)
        return Tried(position, math.log(len(data)), (rounded, data))

    start = -guessed_index(prepared.z, 0.2)
    found, least = _search(at, math.log(max_bytes), start, -COARSEST, slope=1 / STEP_UNITS)
    if found is None:
        raise InputError(
            f"max_bytes = {max_bytes:g} is out of reach, the least is {math.exp(least):.0f}"
        )
    return found.result


def guessed_index(z: Tensor, error: float) -> int:
    """Guess the index of the step with which coefficients Z are coded to a relative error.

    Each coefficient loses its square or a share of Δ², whichever is less (reverse water-filling).
    """
    exponents = torch.frexp(z).exponent.flatten().clamp_min(-30) + 30
    energy = torch.bincount(exponents, z.flatten().square().double(), minlength=1)
    count = torch.bincount(exponents, minlength=len(energy)).double()
    total = float(energy.sum())
    for index in range(COARSEST, FINEST, -8):
        lost = torch.minimum(energy, count * GUESS_SHARE * 4.0 ** (index / STEP_UNITS)).sum()
        if lost <= error**2 * total:
            return index
    return FINEST


def _search(
    at: Callable[[int], Tried],
    target: float,
    start: int,
    first: int,
    slope: float = 0.4 / STEP_UNITS,
) -> tuple[Tried | None, float]:
    """Find the last position whose value is at most the target, as nearly as CLOSE, by secants.

    at: tries a position; values grow with it. first: the position with the least value. Returns
    the best try, None where none meets the target, and the least value that was seen.
    """
    last = first + COARSEST - FINEST
    below = above = before = None
    position, least = min(max(start, first), last), math.inf
    for tries in range(COARSEST - FINEST):
        tried = at(position)
        least = min(least, tried.value)
        if tried.value <= target:
            below = tried
            if tried.value >= target - CLOSE * (1 + tries) or position == last:
                break
        else:
            above = tried
            if position == first:
                break
        if below and above:
            if above.position - below.position <= 1 or tries >= TRIES:
                break
            before = below if tried is above else above
        if below and above and tries >= SECANTS:  # where secants do not close in, halves do
            position = (below.position + above.position) // 2
            continue
        if before:
            rise = (tried.value - before.value) / (tried.position - before.position)
            slope = max(rise, slope / 4)
        wanted = (target - CLOSE / 2 - tried.value) / slope
        if not (below and above):  # rather too far than once more on the same side
            wanted *= 1 + tries / 4
        before = tried
        position += round(wanted) or (1 if tried is below else -1)
        lowest = below.position + 1 if below else first
        highest = above.position - 1 if above else last
        position = min(max(position, lowest), highest)
    return below, least


def measured_errors(codec: Codec, tokens: Tensor, data: bytes) -> dict[str, float]:
    """Measure ‖X − X_hat‖ / ‖X‖ of the clean tokens and ‖F − F̂‖ / ‖F‖ of what is decoded."""
    x, mean, std = codec.normalised(data)
    header = codec.header(data)
    decoded = codec.finished(x * std[:, None] + mean[:, None], header.extremes)
    return {
        "rel_error": relative(normalise(codec.clean(tokens))[0], x),
        "rel_error_original": relative(float_on_cpu(tokens), decoded),
    }


def relative(x: Tensor, decoded: Tensor) -> float:
    """Return ‖x − decoded‖ / ‖x‖, in float64; 0 of zeros that stay zeros."""
    x, decoded = x.double(), decoded.double()
    return float((x - decoded).norm() / x.norm().clamp_min(torch.finfo(x.dtype).tiny))
