"""Tokens of one's own encoder: from another folder, with the package installed, and back again.

The encoder is a randomly initialised vision transformer; the pictures are real photographs.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from commands import ROOT
from conftest import TRAIN

OWN_SCRIPT = '''
import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

import lowrank_tokens
from lowrank_tokens import Codec, FeatureCache, write_cache

parquet, rows, columns = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
assert "site" in lowrank_tokens.__file__, lowrank_tokens.__file__


class VisionTransformer(torch.nn.Module):
    """Patches of 16 pixels, a class token, D = 64."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 64, 16, 16)
        self.class_token = torch.nn.Parameter(torch.randn(1, 1, 64))
        self.places = torch.nn.Parameter(0.1 * torch.randn(1, 1 + rows * columns, 64))
        kind = {"dropout": 0, "batch_first": True, "norm_first": True}
        blocks = [torch.nn.TransformerEncoderLayer(64, 4, 128, **kind) for _ in range(2)]
        self.blocks = torch.nn.Sequential(*blocks)

    @torch.no_grad()
    def forward(self, data):
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((16 * columns, 16 * rows))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        x = self.patches(pixels[None]).flatten(2).mT
        return self.blocks(torch.cat([self.class_token, x], 1) + self.places)[0]  # [1 + T, D]


torch.manual_seed(0)
encoder = VisionTransformer().eval()
photographs = [(r["image"]["bytes"], r["group"]) for r in pq.read_table(parquet).to_pylist()]
known, new = photographs[:-9], photographs[-9:]
assert not {group for _, group in known} & {group for _, group in new}


def items(some):
    for data, group in some:
        tokens = encoder(data)[1:]
        yield {"tokens": tokens, "grid": (rows, columns), "image": data, "group": group}


cache = write_cache("cache", items(known), encoder_id="my-vit")
others = write_cache("new", items(new), encoder_id="my-vit")
grid = (rows, columns)
codec = Codec.fit([(cache[:], grid)], info={"encoder": cache.manifest["encoder"]})
codec.save("codec.safetensors")
codec = Codec.load("codec.safetensors")
errors, sizes = [], []
for data, _ in new:
    tokens = encoder(data)[1:]
    coded = codec.encode(tokens, grid, error=0.15)
    errors.append(float((codec.decode(coded) - tokens).norm() / tokens.norm()))
    sizes.append(len(coded))
print(json.dumps({"errors": errors, "sizes": sizes, "bf16": 2 * tokens.numel()}))

import os

os.mkdir("tensors")  # with the class token
tokens = [encoder(data) for data, _ in known]
torch.save(tokens[0], "tensors/a.pt")
np.save("tensors/b.npy", torch.stack(tokens[1:5]).half().numpy())
save_file({str(i): t.bfloat16() for i, t in enumerate(tokens[5:])}, "tensors/c.safetensors")
'''
READ_BACK = """
from lowrank_tokens import FeatureCache, VisionTokens
coded, cache = VisionTokens("factors"), FeatureCache("new")
assert len(coded) == len(cache) and coded.grid_of(-1) == cache.grids[-1]
print(max(float((c - t).norm() / t.norm()) for c, t in zip(coded, cache[:].float())))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder in which pip has installed the package, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE", "lowrank_tokens"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--target", folder / "site", folder]
    subprocess.run(pip, check=True, cwd=folder)
    return folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(14, 14), (12, 14)])
def test_tokens_of_an_own_encoder_go_through_bytes_and_the_commands_of_the_checkout(
    rows, columns, site, tiny_data, tmp_path, script
):
    (parquet,) = (tiny_data / "data").glob("*.parquet")

    def own(code, *argv):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *map(str, argv)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def command(name, *flags):
        done = script(name, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(own(OWN_SCRIPT, parquet, rows, columns))
    assert max(found["errors"]) <= 0.15 and max(found["sizes"]) < found["bf16"] / 4

    caches = {name: ["--cache_dir", tmp_path / name] for name in ("cache", "new", "imported")}
    results = ["--results_dir", tmp_path / "results"]
    command("train_real_data.py", *caches["cache"], *results, *TRAIN, "--log_dir", tmp_path / "log")
    for name in ("cache", "new"):  # images that it was trained on, and new ones
        said = command("compare_svd_nn.py", *caches[name], *results)
        assert re.search(rf"my-vit, \d+ images, T={rows * columns}, D=64", said)

    codec, out = tmp_path / "codec.safetensors", tmp_path / "factors"
    coding = ["--exact", "--codec", codec, "--target_error", 0.15, "--out", out]
    command("factorize.py", *coding, *caches["new"])
    assert float(own(READ_BACK)) <= 0.15

    grid = [] if rows == columns else ["--grid", rows, columns]
    said = command(
        *("extract_features.py", "--import_features", tmp_path / "tensors", *caches["imported"]),
        *("--encoder_id", "my-vit", "--drop_tokens", 1, *grid),
    )
    assert ("square grid" in said) == (rows == columns)
    own(
        "from lowrank_tokens import FeatureCache; a, b = FeatureCache('cache'), "
        "FeatureCache('imported'); assert (a[:].float() - b[:].float()).abs().max() < 0.05"
    )
    command("compare_svd_nn.py", *caches["imported"], *results)
