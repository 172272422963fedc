"""The package as other people install it: what the wheel holds, and what reading needs."""

import subprocess
import sys
import zipfile

import pytest
import tiny
import torch
from commands import ROOT

from lowrank_tokens.codec import Codec
from lowrank_tokens.factor_files import CODED, FactorWriter, copy_codec

GRID = (4, 6)
ONLY_NEEDED = """
import sys

ALLOWED = {"torch", "numpy", "safetensors", "constriction", "lowrank_tokens"}
OWN = {"pyarrow", "PIL", "tqdm", "filelock", "matplotlib", "transformers", "scipy", "pandas"}
OURS = {"common", "encoders", "heads", "training", "figures", "experiments", "model"}
OURS |= {"svd_baseline", "qwenvl_dataloader", "factorize"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OWN | OURS:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from lowrank_tokens import VisionTokens, load_factors
tokens = VisionTokens(sys.argv[1])[1]
assert load_factors(sys.argv[1], [1])[0].equal(tokens)
print(list(tokens.shape), float(tokens.norm()))
"""


@pytest.fixture
def coded_folder(tmp_path):
    """A finished folder of two coded images."""
    raw = tiny.steep_tokens(8, 24)
    codec = Codec.fit([(raw, GRID)])
    codec.save(tmp_path / "codec.safetensors")
    images = [codec.coded_image(one, GRID, step=0.3) for one in raw[:2]]
    header = {"dtype": CODED, "count": 2, "num_tokens": 24, "feature_dim": 48, "rank": None}
    header |= {"codec_sha256": codec.sha256}
    writer = FactorWriter(tmp_path / "out", header)
    copy_codec(tmp_path / "codec.safetensors", tmp_path / "out")
    writer.write_coded(0, images)
    writer.finish()
    return tmp_path / "out", codec.decode(images[1].data)


def test_coded_tokens_are_read_with_torch_numpy_safetensors_and_constriction_alone(
    coded_folder, tmp_path
):
    folder, wanted = coded_folder
    done = subprocess.run(
        [sys.executable, "-c", ONLY_NEEDED, str(folder)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1][:6] == str(float(torch.linalg.vector_norm(wanted)))[:6]


def test_the_wheel_holds_the_files_of_the_package_and_nothing_else(tmp_path):
    build = "from setuptools import build_meta as b; import sys; b.build_wheel(sys.argv[1])"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in ROOT.glob("*/*.py"):
        (source / path.parent.name).mkdir(exist_ok=True)
        (source / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("lowrank_tokens-0.1.0-*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    files = (ROOT / "lowrank_tokens").glob("*.py")
    assert names == {f"lowrank_tokens/{path.name}" for path in files}
