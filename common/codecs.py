"""The codec of --codec, opened for a cache."""

from __future__ import annotations

from pathlib import Path

from lowrank_tokens.cache import FeatureCache
from lowrank_tokens.codec import Codec
from lowrank_tokens.exceptions import InputError


def codec_for_cache(
    path: str | Path, cache: FeatureCache, accept_other_encoder: bool = False, otherwise: str = ""
) -> Codec:
    """Load a codec. Raises InputError where it does not fit the cache.

    accept_other_encoder: take one that was fitted to another encoder's tokens of as many features.
    otherwise: a further remedy for such a one.
    """
    codec = Codec.load(path)
    remedy = f"fit one with experiments.fit_codec --cache_dir {cache.cache_dir}"
    if codec.feature_dim != cache.feature_dim:
        raise InputError(
            f"--codec {path} is of {codec.feature_dim} features, {cache.cache_dir} has "
            f"{cache.feature_dim}: {remedy}"
        )
    if not accept_other_encoder and (words := codec.other_encoder(cache.manifest["encoder"])):
        raise InputError(f"--codec {path} {words}: {remedy}{otherwise}")
    return codec
