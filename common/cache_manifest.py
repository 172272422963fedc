"""A feature cache's manifest.json, checked before anything else of the cache is opened."""

from __future__ import annotations

import json
import math
from pathlib import Path

from common.errors import UserError
from common.files import check_keys
from common.shard_folder import check_shards, read_finished

FORMAT = 2  # of format 1 are caches of one grid, features [n, T, D]
BUILD_CACHE = "build the cache again with extract_features.py --overwrite"
MANIFEST_KEYS = {
    **{"format": int, "kind": str, "encoder": dict, "resize": (str, type(None)), "grid": list},
    **{"num_tokens": int, "feature_dim": int, "count": int, "shards": list, "skipped": list},
    **{"rows": dict, "singular_values": (dict, type(None)), "dtype": str, "split_by": str},
}


def read_manifest(cache_dir: Path) -> dict:
    """The manifest of a finished cache. Raises UserError where it, or a file it names, is not as it
    should be; of the files only their sizes are looked at."""
    if not cache_dir.is_dir():
        raise UserError(
            f"--cache_dir {cache_dir} does not exist: make it with extract_features.py, or with "
            "experiments.make_demo_data and extract_features.py --demo"
        )
    again = "the extraction was interrupted, run the same extract_features.py command to finish it"
    path, manifest = read_finished(cache_dir, again, BUILD_CACHE)
    check_keys(path, manifest, MANIFEST_KEYS, BUILD_CACHE)
    if manifest["format"] not in (1, FORMAT):
        raise UserError(f"{path} has format {manifest['format']}, not {FORMAT}: {BUILD_CACHE}")
    check_shards(path, manifest, BUILD_CACHE, tables_of(manifest))
    check_keys(path, manifest["encoder"], {"id": str}, BUILD_CACHE)
    wrong = {
        "kind": manifest["kind"] not in ("real", "demo", "imported"),
        # None: imported, not known
        "resize": manifest["resize"] not in ("stretch", "pad", "native", None),
        "grid": [type(side) for side in manifest["grid"]] != [int, int]
        or math.prod(manifest["grid"]) != manifest["num_tokens"],
        "feature_dim": manifest["feature_dim"] < 1,
        "rows": manifest["rows"]["file"] != "rows.parquet",
        "singular_values": [f["file"] for f in tables_of(manifest)[1:]]
        != ["singular_values.safetensors"] * (manifest["resize"] != "native"),
    }
    for key in [key for key, is_wrong in wrong.items() if is_wrong]:
        value = json.dumps(manifest[key])[:60]
        raise UserError(f"{path} is damaged ({key} is {value}): {BUILD_CACHE}")
    return manifest


def tables_of(manifest: dict) -> list[dict]:
    """A manifest's entries of its table of rows and, where it has them, its singular values."""
    spectrum = manifest["singular_values"]
    return [manifest["rows"], *([spectrum] if spectrum else [])]
