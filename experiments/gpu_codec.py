"""Part `codec` of `experiments.gpu_check`: coded images from factors that the device made.

The codec itself is integers on the CPU: what the device gives is the factors, and with other
rounding other bytes may come out, of the same length and error. Decoding is the CPU's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from coding.codec import fit
from experiments.gpu_bench import Setting, compared, row, speed, timed
from svd_baseline import gram_eigh

STEP = 1.0  # Δ, in units of normalised tokens: an error of a few per cent to a fifth
IMAGES = 8


def svd_factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """u [b, T, r], s [b, r], v [b, D, r] on the CPU, computed where x is."""
    u, b = gram_eigh(x, rank)
    s = torch.linalg.vector_norm(b, dim=-1)
    return u.cpu(), s.cpu(), (b / s.clamp_min(1e-12)[..., None]).mT.cpu()


def rel_of(raw: Tensor, other: Tensor) -> float:
    return float((raw - other).norm() / raw.norm())


def check_codec(setting: Setting) -> Iterator[dict]:
    sizes = setting.sizes
    side = math.isqrt(sizes.tokens)
    grid = (side, side)
    raw = setting.x(IMAGES, sizes.tokens, sizes.features)
    codec = fit(lambda: [(raw, grid)], grid)
    x = raw.to(setting.device)
    time = timed(partial(svd_factors, x, sizes.rank), setting)
    yield from speed(f"exact factors for the codec, batch {IMAGES}", IMAGES, time, "")
    of_device, of_cpu = (svd_factors(own, sizes.rank) for own in (x, raw))
    encoded = {
        name: [codec.encode(raw[i], grid, STEP, (u[i], s[i], v[i])) for i in range(IMAGES)]
        for name, (u, s, v) in (("device", of_device), ("CPU", of_cpu))
    }
    sizes_of = {name: sum(map(len, images)) for name, images in encoded.items()}
    same = sum(a == b for a, b in zip(*encoded.values(), strict=True))
    yield row("images with the same bytes from either's factors", same, f"of {IMAGES}")
    apart = abs(sizes_of["device"] / sizes_of["CPU"] - 1)
    note = f"{sizes_of['device'] // IMAGES} bytes an image at step {STEP}"
    yield compared("bytes: device's factors against the CPU's, relative", apart, 0.01, note)
    errors = {
        name: sum(rel_of(raw[i], codec.decode(images[i])) for i in range(IMAGES)) / IMAGES
        for name, images in encoded.items()
    }
    apart, note = abs(errors["device"] / errors["CPU"] - 1), f"raw_error {errors['device']:.4f}"
    what = "error after decoding: device's factors against the CPU's, relative"
    yield compared(what, apart, 0.01, note)
    one = tuple(part[0] for part in of_device)
    time = timed(lambda: codec.encode(raw[0], grid, STEP, one), setting)
    yield row("encode, one image, on the CPU", 1e3 * time.median, "ms")
    time = timed(lambda: codec.decode(encoded["device"][0]), setting)
    yield row("decode, one image, on the CPU", 1e3 * time.median, "ms")


CHECKS = {"codec": {"codec": check_codec}}
