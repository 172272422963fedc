"""One image at a step, or at the largest step with which a target is met."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coding.codec import HEADER, Codec, Factors
from coding.coded_files import CodedImage
from common.errors import UserError
from qwenvl_dataloader import normalise

# a search tries steps 2^(i / 16): 3 % of bytes apart, at most 9 tries
FINEST, COARSEST = -96, 192


def coded_image(
    codec: Codec, raw: Tensor, grid: tuple[int, int], step: float, factors: Factors | None = None
) -> CodedImage:
    """Raw tokens [T, D] at one step."""
    return _measured(codec, raw, codec.encode(raw, grid, step, factors), step)


def image_for_target(
    codec: Codec,
    raw: Tensor,
    grid: tuple[int, int],
    factors: Factors | None = None,
    *,
    target_error: float | None = None,
    target_kb: float | None = None,
) -> CodedImage:
    """Raw tokens [T, D] at the largest step whose error of the raw tokens is at most target_error,
    or at the smallest whose bytes are at most 1000 · target_kb.

    Raises UserError where no step does.
    """
    prepared = codec.prepare(raw, grid, factors)

    def at(index: int) -> CodedImage:
        step = 2 ** (index / 16)
        return _measured(codec, raw, codec.encode_prepared(prepared, step), step)

    if target_error is not None:
        found = _last(lambda i: at(i).errors["rel_error_original"] <= target_error)
        if found is None:
            least = at(FINEST).errors["rel_error_original"]
            raise UserError(
                f"--target_error {target_error:g} is out of reach, the least is {least:.4f}: "
                "type a larger one"
            )
        return at(found)
    # the bytes fall as the step grows: the first step that fits is after the last that does not
    last = _last(lambda i: len(at(i).data) > 1000 * target_kb)
    if last == COARSEST:
        least = len(at(COARSEST).data) / 1000
        raise UserError(
            f"--target_kb {target_kb:g} is out of reach, the least is {least:.3f}: type more"
        )
    return at(FINEST if last is None else last + 1)


def _last(holds: Callable[[int], bool]) -> int | None:
    """The last index from FINEST to COARSEST at which `holds`, true up to some index, still is."""
    low, high = FINEST - 1, COARSEST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return None if low < FINEST else low


def _measured(codec: Codec, raw: Tensor, data: bytes, step: float) -> CodedImage:
    """What was stored, with its errors as decoded from these very bytes."""
    decoded, mean, std = codec.normalised(data)
    raw = raw.float()
    errors = {
        "rel_error": _relative(normalise(raw)[0], decoded),
        "rel_error_original": _relative(raw, decoded * std[:, None] + mean[:, None]),
    }
    return CodedImage(data, HEADER.unpack_from(data)[5], step, errors)


def _relative(x: Tensor, decoded: Tensor) -> float:
    """‖x − decoded‖ / ‖x‖, in float64; 0 of zeros that stay zeros."""
    x, decoded = x.double(), decoded.double()
    return float((x - decoded).norm() / x.norm().clamp_min(torch.finfo(x.dtype).tiny))
