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
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_tokens.codec_fitting import fit_arrays
from lowrank_tokens.entropy import (
    CODED_FROM,
    OFFSET_LEVEL,
    SIGMA_LEVEL,
    SymbolReader,
    Tables,
    encode_symbols,
    varint,
    zigzag,
)
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import save_tensors, sha256_file
from lowrank_tokens.grids import Grid
from lowrank_tokens.linalg import (
    LARGEST_FEATURE,
    LeftSingular,
    left_singular,
    normalise,
    usable_features,
)
from lowrank_tokens.rate_search import COARSEST, FINEST, Tried, guessed_index, search
from lowrank_tokens.stream import (
    EXTREMES,
    FACTORS,
    FORMS,
    STEP_UNITS,
    TRANSFORM,
    Extremes,
    StreamHeader,
    checksummed,
    extreme_entries,
    is_grid,
    positive_number,
    read_extremes,
    replace_extremes,
    side_information,
    step_index,
    step_of,
    stream_header,
    write_extremes,
)
from lowrank_tokens.transform import (
    LAMBDA,
    adapted,
    column_bits,
    dct,
    independent,
    inverse_dct,
    level_offsets,
    on_grid,
    orthonormal,
    sigma_levels,
    statistics_dct,
    to_coded,
    to_levels,
    tokens_shift,
)

KIND, CODEC_FORMAT = "codec", 1

DROPPED_BELOW = 2.0  # components with σ_k less than this many steps
# Rank by rate: a component is dropped whose squared error is worth less than its bits, and
# COMPONENT_BITS for what else it sends. In a metric this gained nothing.
LAMBDA_A = 0.3
COMPONENT_BITS = 5
DROP_ROUNDS = 3
IMAGES_AT_ONCE = 32  # of a batch that is decoded

FORM_ARRAYS = {  # what only one form reads
    FACTORS: ("rows", "columns", "starts"),
    TRANSFORM: ("spectrum_left", "spectrum_right"),
}
PROVENANCE = "fitted_images"  # array that no decoding uses


class SvdFactors(NamedTuple):
    """X ≈ u diag(s) vᵀ of an image's normalised tokens."""

    u: Tensor  # [T, r]
    s: Tensor  # [r]
    v: Tensor  # [D, r]


class ImageFactors(NamedTuple):
    """Factors of one image, float32; its tokens are A·B · std + mean."""

    a: Tensor  # [T, r]
    b: Tensor  # [r, D]
    mean: Tensor  # [T]
    std: Tensor  # [T]


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
    def left_singular(self) -> LeftSingular:
        """Return the left singular vectors and the singular values of Z."""
        return left_singular(self.z)


@dataclass
class Rounded:
    """The symbols of one image at one step."""

    header: bytes  # behind HEADER
    flags: int
    parts: list[tuple[np.ndarray, np.ndarray]]  # symbols and levels, in reading order
    rank: int
    step_index: int
    symbols: list[np.ndarray]  # of A [T, r] and B [d, r], or of Z [d, T]


class StepChosen(NamedTuple):
    """The bytes of one image, and the rank and the step that they were written with."""

    data: bytes
    rank: int
    step: float


class CodedImage(NamedTuple):
    """One image as it is stored."""

    data: bytes
    rank: int
    step: float
    errors: dict[str, float]  # rel_error of X, rel_error_original of the tokens


class Codec:
    """The arrays that all images share, with `encode` and `decode` of one image's tokens.

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
        remedy = "fit one with Codec.fit (in the checkout: python -m experiments.fit_codec)"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is no codec, or damaged ({error}): {remedy}") from None
        if metadata.get("kind") != KIND or metadata.get("format") != str(CODEC_FORMAT):
            raise InputError(f"{path} is not a codec of format {CODEC_FORMAT}: {remedy}")
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
        metadata = {
            "kind": KIND,
            "format": str(CODEC_FORMAT),
            "info": info,
            "identity": self.identity,
        }
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
        factors: SvdFactors | None = None,
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
        chosen = self._at_target(tokens, grid, step, error, max_bytes, form, factors)
        return chosen.data

    def coded_image(
        self,
        tokens: Tensor,
        grid: Grid,
        *,
        step: float | None = None,
        error: float | None = None,
        max_bytes: float | None = None,
        form: str = FACTORS,
        factors: SvdFactors | None = None,
    ) -> CodedImage:
        """Encode as `encode`, and measure the errors of what the bytes decode to."""
        chosen = self._at_target(tokens, grid, step, error, max_bytes, form, factors)
        return CodedImage(*chosen, self.measured_errors(tokens, chosen.data))

    def _at_target(
        self,
        tokens: Tensor,
        grid: Grid,
        step: float | None,
        error: float | None,
        max_bytes: float | None,
        form: str,
        factors: SvdFactors | None,
    ) -> StepChosen:
        """Encode at the one target that is named."""
        targets = {"step": step, "error": error, "max_bytes": max_bytes}
        named = [name for name, value in targets.items() if value is not None]
        if len(named) != 1:
            raise InputError(
                f"give one of step, error and max_bytes, not {' and '.join(named) or 'none'}"
            )
        if form not in FORMS:
            raise InputError(f"form = {form!r} is not one of {', '.join(FORMS)}")
        value = positive_number(named[0], targets[named[0]])
        prepared = self.prepare(tokens, grid, factors)
        if step is not None:
            rounded = self._rounded(prepared, step_index(value), form)
            data = self._written(rounded)
        elif error is not None:
            rounded = self._for_error(prepared, tokens, value, form)
            data = self._written(rounded)
        else:
            rounded, data = self._for_bytes(prepared, value, form)
        return StepChosen(data, rounded.rank, step_of(rounded.step_index))

    def _for_error(self, prepared: Prepared, tokens: Tensor, error: float, form: str) -> Rounded:
        """Return the symbols at the coarsest step found with which the error is met."""
        tokens = float_on_cpu(tokens)
        norm = float(tokens.double().norm())

        def at(index: int) -> Tried[Rounded]:
            rounded = self._rounded(prepared, index, form)
            decoded = self._decoded_from(rounded, prepared, form)
            off = float((tokens - decoded).double().norm()) / max(norm, 1e-300)
            return Tried(index, math.log(max(off, 1e-12)), rounded)

        found, least = search(at, math.log(error), guessed_index(prepared.z, error), FINEST)
        if found is None:
            least = math.ceil(math.exp(least) * 1e4) / 1e4
            raise InputError(f"error = {error:g} is out of reach, the least is {least:.4f}")
        return found.result

    def _for_bytes(self, prepared: Prepared, max_bytes: float, form: str) -> tuple[Rounded, bytes]:
        """Return the symbols and the bytes at the finest step found whose bytes are few enough."""

        def at(position: int) -> Tried[tuple[Rounded, bytes]]:
            rounded = self._rounded(prepared, -position, form)
            data = self._written(rounded)
            return Tried(position, math.log(len(data)), (rounded, data))

        start = -guessed_index(prepared.z, 0.2)
        found, least = search(at, math.log(max_bytes), start, -COARSEST, slope=1 / STEP_UNITS)
        if found is None:
            raise InputError(
                f"max_bytes = {max_bytes:g} is out of reach, the least is {math.exp(least):.0f}"
            )
        return found.result

    def measured_errors(self, tokens: Tensor, data: bytes) -> dict[str, float]:
        """Measure ‖X − X_hat‖ / ‖X‖ of the clean tokens and ‖F − F̂‖ / ‖F‖ of what is decoded."""
        x, mean, std = self.normalised(data)
        header = self.header(data)
        decoded = self.finished(x * std[:, None] + mean[:, None], header.extremes)
        return {
            "rel_error": relative(normalise(self.clean(tokens))[0], x),
            "rel_error_original": relative(float_on_cpu(tokens), decoded),
        }

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
        return replace_extremes(tokens, extreme), write_extremes(tokens, extreme)

    def prepare(self, tokens: Tensor, grid: Grid, factors: SvdFactors | None = None) -> Prepared:
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
        grid, step = prepared.grid, step_of(index)
        head = varint(grid[0]) + varint(grid[1]) + varint(zigzag(index))
        flags = FORMS.index(form) | EXTREMES * bool(prepared.extremes)
        statistics = prepared.statistics.ravel(), self._statistics_levels(grid)
        if form == TRANSFORM:
            levels = self._transform_levels(index, grid)
            q, offsets = adapted(prepared.z.mT.numpy() / step, levels, self.tables)
            side = side_information([], offsets)
            parts = [statistics, *side, (q.ravel(), to_coded(levels + offsets).ravel())]
            return Rounded(head + prepared.extremes, flags, parts, 0, index, [q])
        q_a, q_b, sigma = self._rounded_factors(prepared, step)
        rows, columns = self._row_levels(sigma, grid), self._column_levels(sigma)
        offsets = [level_offsets(q_a, rows, self.tables), level_offsets(q_b, columns, self.tables)]
        first = int(sigma[0]) if len(sigma) else 0
        side = side_information(-np.diff(sigma), *offsets)
        levels = [(rows + offsets[0]).ravel(), (columns + offsets[1]).ravel()]
        body = np.concatenate([q_a.ravel(), q_b.ravel()]), to_coded(np.concatenate(levels))
        head += varint(len(sigma)) + varint(zigzag(first)) + prepared.extremes
        return Rounded(head, flags, [statistics, *side, body], len(sigma), index, [q_a, q_b])

    def _rounded_factors(
        self, prepared: Prepared, step: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the symbols of A [T, r] and B [d, r], and i_σ [r]."""
        (u, s), grid = prepared.left_singular, prepared.grid
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
        rest = rounded.header + encode_symbols(rounded.parts, self.tables)
        return checksummed(rounded.flags, self.identity, rest)

    # ---------------------------------------------------------------------------------- decoding

    def factors(self, data: bytes) -> ImageFactors:
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
        return ImageFactors(a, self._b(q_b, header.step), mean[:, 0], std[:, 0])

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
        return self._x_hat_batch([symbols], form, [step], grid, torch.device("cpu"))[0]

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
        step = step_of(rounded.step_index)
        x = self._x_hat(rounded.symbols, form, step, prepared.grid)
        extremes = read_extremes(prepared.extremes, 0)[0] if prepared.extremes else None
        return self.finished(x.mul_(prepared.std).add_(prepared.mean), extremes)

    def finished(self, tokens: Tensor, extremes: Extremes | None) -> Tensor:
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
        device = torch.device(device or "cpu")
        headers, read = [], []
        for i, data in enumerate(streams):
            try:
                headers.append(self.header(data))
                read.append(self._symbols(data, headers[-1]))
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
                x = self._x_hat_batch([read[i][1:] for i in some], form, steps, grid, device)
                for one, i in zip(x, some, strict=True):
                    mean, std = (t.to(device) for t in self._statistics_of(read[i][0], grid))
                    tokens[i] = self.finished(one * std + mean, headers[i].extremes)
        return tokens

    def _x_hat_batch(
        self,
        symbols: list[list[np.ndarray]],
        form: str,
        steps: list[float],
        grid: Grid,
        device: torch.device,
    ) -> Tensor:
        """Return X_hat [n, T, D] of images of one grid and form."""
        inverse = self._inverse.to(device)
        last = [s[-1] for s in symbols]  # [d, r] or [d, T] each
        used = np.flatnonzero(np.logical_or.reduce([q.any(1) for q in last]))
        columns = inverse[:, torch.from_numpy(used).to(device)].mT
        scaled = [
            torch.from_numpy(q[used].T.astype(np.float32)) * s
            for q, s in zip(last, steps, strict=True)
        ]
        sizes = [len(part) for part in scaled]
        parts = (torch.cat(scaled).to(device) @ columns).split(sizes)  # one product for all images
        if form == TRANSFORM:
            return inverse_dct(torch.stack(parts), grid)
        bases = [orthonormal(q[0]) for q in symbols]
        a = inverse_dct(torch.cat(bases, dim=1).to(device), grid).split(sizes, dim=1)
        return torch.stack([left @ right for left, right in zip(a, parts, strict=True)])

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
        positions = header.extremes.positions if header.extremes else np.zeros(0, dtype=np.int64)
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
        fitted = fit_arrays(again, grid, metric)
        if image_hashes:
            hashes = [list(bytes.fromhex(one[:16])) for one in image_hashes]
            fitted.arrays[PROVENANCE] = torch.tensor(hashes, dtype=torch.uint8)
        return cls(fitted.arrays, (info or {}) | {"images": fitted.images})


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


def arrays_sha256(arrays: dict[str, Tensor]) -> str:
    """Return a codec's identity: SHA-256 of the format and of the arrays that decoding uses."""
    digest = hashlib.sha256(f"lowrank_tokens codec {CODEC_FORMAT}".encode())
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


def relative(x: Tensor, decoded: Tensor) -> float:
    """Return ‖x − decoded‖ / ‖x‖, in float64; 0 of zeros that stay zeros."""
    x, decoded = x.double(), decoded.double()
    return float((x - decoded).norm() / x.norm().clamp_min(torch.finfo(x.dtype).tiny))
