"""Vision tokens in few bytes: feature caches, exact factors, and the codec of coded tokens.

    from lowrank_tokens import VisionTokens
    tokens = VisionTokens("factors/exact")[0]     # [T, D] float32, in the encoder's own units

Exports are loaded when they are first used (PEP 562), so that reading coded tokens imports torch,
numpy, safetensors and constriction, and nothing else.
"""

import importlib

_HOMES = {
    "Codec": "codec",
    "FeatureCache": "cache",
    "VisionTokens": "factor_files",
    "exact_factors": "linalg",
    "load_factors": "factor_files",
    "read_factors": "factor_files",
    "write_cache": "cache_writer",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
