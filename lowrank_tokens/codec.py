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

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lowrank_tokens.codec_arguments import (
    SvdFactors,
    check_tokens,
    checked_batches,
    checked_factors,
    iter_once,
)
from lowrank_tokens.codec_file import (
    FORM_ARRAYS,
    PROVENANCE,
    arrays_sha256,
    read_codec_file,
    write_codec_file,
)
from lowrank_tokens.codec_fitting import fit_arrays
from lowrank_tokens.entropy import Tables, encode_symbols
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import sha256_file
from lowrank_tokens.grids import Grid, checked_grid
from lowrank_tokens.levels import Levels, integers
from lowrank_tokens.linalg import normalise
from lowrank_tokens.rate_search import COARSEST, FINEST, Tried, guessed_index, search
from lowrank_tokens.stream import (
    BYTES,
    FACTORS,
    FORMS,
    STEP_UNITS,
    TRANSFORM,
    Extremes,
    StreamHeader,
    checksummed,
    extreme_entries,
    positive_number,
    read_extremes,
    replace_extremes,
    step_index,
    step_of,
    stream_header,
    write_extremes,
)
from lowrank_tokens.symbols import Prepared, Rounded, decoded_x, read_symbols, rounded
from lowrank_tokens.token_statistics import TokenStatistics
from lowrank_tokens.transform import dct, inverse_dct, orthonormal

IMAGES_AT_ONCE = 32  # of a batch that is decoded


class ImageFactors(NamedTuple):
    """Factors of one image, float32; its tokens are A·B · std + mean."""

    a: Tensor  # [T, r]
    b: Tensor  # [r, D]
    mean: Tensor  # [T]
    std: Tensor  # [T]


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

    arrays: as `codec_file` names them.
    info: what it was made from: encoder, data, metric, groups.
    sha256: of the file; None before it is saved.
    """

    def __init__(self, arrays: dict[str, Tensor], info: dict, sha256: str | None = None) -> None:
        self.tensors, self.info, self.sha256 = arrays, info, sha256
        self._klt = arrays["klt"].float()
        self._inverse = arrays.get("inverse", arrays["klt"]).float()
        self.in_metric = "inverse" in arrays
        self.levels = Levels(arrays)
        self.tables = Tables(integers(arrays["tables"]), arrays["table_sizes"].tolist())
        self.statistics = TokenStatistics(arrays["scales"].tolist(), self.levels, self.tables)
        self.feature_dim = len(self._klt)
        exponents = arrays.get("channel_exponents")
        self._channels = None if exponents is None else torch.exp2(exponents.float())  # [D]
        self.identity = arrays_sha256(arrays)

    # ------------------------------------------------------------------------------------- files

    @classmethod
    def load(cls, path: str | Path) -> Codec:
        """Read a file of `save`. Raises InputError where it is missing, damaged or another."""
        return cls(*read_codec_file(path), sha256_file(path))

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
        write_codec_file(path, self.tensors, self.info)
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
        return sum(a.nbytes for name, a in self.tensors.items() if name != PROVENANCE)

    def form_nbytes(self, form: str) -> int:
        """Return the bytes of the arrays that one form reads."""
        unread = {PROVENANCE, *FORM_ARRAYS[FACTORS], *FORM_ARRAYS[TRANSFORM]}
        unread -= set(FORM_ARRAYS[form])
        return sum(a.nbytes for name, a in self.tensors.items() if name not in unread)

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
        if error is not None and value >= 1:
            raise InputError(f"error = {error!r} is a fraction: give less than 1, 0.16 for 16 %")
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

        found, least = search(at, math.log(error), guessed_index(prepared.z, error, form), FINEST)
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

        start = -guessed_index(prepared.z, 0.2, form)
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
        statistics, mean, std = self.statistics.rounded(raw, grid)
        if factors is None:
            z = self.transformed((raw - mean) / std, grid)
        else:
            u, s, v = map(float_on_cpu, checked_factors(factors, *tokens.shape))
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
        return rounded(prepared, index, form, self.levels, self.tables, self.in_metric)

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
        mean, std = self.statistics.of_symbols(statistics, header.grid)
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
        mean, std = self.statistics.of_symbols(statistics, header.grid)
        return self._x_hat(symbols, header.form, header.step, header.grid), mean[:, 0], std[:, 0]

    def _x_hat(self, symbols: Sequence[np.ndarray], form: str, step: float, grid: Grid) -> Tensor:
        return decoded_x([symbols], form, [step], grid, self._inverse)[0]

    def decode(self, data: bytes) -> Tensor:
        """Decode tokens [T, D] float32, in the encoder's own units, of either form.

        Raises InputError where the bytes are not those that `encode` gave, or are another codec's.
        """
        header = self.header(data)
        statistics, *symbols = self._symbols(data, header)
        mean, std = self.statistics.of_symbols(statistics, header.grid)
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
        self, streams: Iterable[bytes], device: torch.device | str | None = None
    ) -> list[Tensor]:
        """Decode several images: a list of tokens [T_i, D] float32 on `device` (default the CPU).

        Symbols are read on the CPU, products are done on the device, all images of a grid at once.
        Errors as `decode`, naming the position in the list.
        """
        device = torch.device(device or "cpu")
        inverse = self._inverse.to(device)
        if isinstance(streams, BYTES):
            raise TypeError("streams is one coded image: give a list of them, or call decode")
        streams, headers, read = list(streams), [], []
        for i, data in enumerate(streams):
            try:
                headers.append(self.header(data))
                read.append(self._symbols(data, headers[-1]))
            except (InputError, TypeError) as error:
                raise type(error)(f"streams[{i}]: {error}") from None
        kinds: dict[tuple[str, Grid], list[int]] = {}
        for i, header in enumerate(headers):
            kinds.setdefault((header.form, header.grid), []).append(i)
        tokens: list[Tensor | None] = [None] * len(streams)
        for (form, grid), places in kinds.items():
            for at in range(0, len(places), IMAGES_AT_ONCE):
                some = places[at : at + IMAGES_AT_ONCE]
                steps = [headers[i].step for i in some]
                try:
                    x = decoded_x([read[i][1:] for i in some], form, steps, grid, inverse)
                except InputError as error:
                    raise InputError(f"one of streams{some}: {error}") from None
                for one, i in zip(x, some, strict=True):
                    mean, std = (t.to(device) for t in self.statistics.of_symbols(read[i][0], grid))
                    tokens[i] = self.finished(one * std + mean, headers[i].extremes)
        return tokens

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
        return read_symbols(data, header, self.levels, self.tables, self.num_directions)

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
        Raises TypeError where `batches` can be read only once, InputError where they are empty, and
        either of these, naming the argument, where one cannot be used.
        """
        if iter_once(batches):
            raise TypeError("batches can be read only once: give a list, or a function")
        again = batches if callable(batches) else lambda: batches
        if not isinstance(info, dict | None):
            raise TypeError(f"info is a {type(info).__name__}: give a dict")
        json.dumps(info)  # raises TypeError now, and not when the codec is saved
        if wrong := [one for one in image_hashes if not re.fullmatch("[0-9a-f]{16,64}", str(one))]:
            raise InputError(f"image_hashes: {wrong[0]!r} is no SHA-256 in hexadecimal digits")
        fitted = fit_arrays(lambda: checked_batches(again()), grid, metric)
        if image_hashes:
            hashes = [list(bytes.fromhex(one[:16])) for one in image_hashes]
            fitted.arrays[PROVENANCE] = torch.tensor(hashes, dtype=torch.uint8)
        return cls(fitted.arrays, (info or {}) | {"images": fitted.images})


def float_on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor as float32 on the CPU, where symbols are made, outside any gradient."""
    return tensor.detach().to("cpu", torch.float32)


def relative(x: Tensor, decoded: Tensor) -> float:
    """Return ‖x − decoded‖ / ‖x‖, in float64; 0 of zeros that stay zeros."""
    x, decoded = x.double(), decoded.double()
    return float((x - decoded).norm() / x.norm().clamp_min(torch.finfo(x.dtype).tiny))
