"""Fixtures: matrices with steep spectra, and a small cache of real photographs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small work; threads would fight over two cores

import hashlib
import importlib
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import cli
import extract_features
import make_demo_data

# three crops of each of 12 photographs
TINY_ROWS = [8 * photograph + crop for photograph in range(12) for crop in range(3)]


@pytest.fixture
def tokens():
    """x [3, 24, 40] float32, rows normalised, singular values falling by three decades."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(3, 24, 24, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(3, 40, 24, generator=generator, dtype=torch.float64))[0]
    x = left * torch.logspace(1, -2, 24, dtype=torch.float64) @ right.mT
    return torch.nn.functional.layer_norm(x, (40,)).float()


def extract(tmp: Path, data: Path, cache: Path, *flags: str) -> None:
    """Encode `data` with the demo's DINOv2 at 112 pixels: T = 16, D = 1536."""
    argv = ["--demo", "--dataset_dir", str(data), "--cache_dir", str(cache), "--image_size", "112"]
    extract_features.main(cli.parse(extract_features.get_args_parser(), argv + list(flags)))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data set folder with 36 rows in the real schema, from real photographs."""
    folder = tmp_path_factory.mktemp("tiny_data")
    table = make_demo_data.build_table(seed=42, rows=TINY_ROWS)
    (folder / "data").mkdir()
    make_demo_data.write_parquet(table, folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def tiny_cache(tiny_data, tmp_path_factory):
    """A feature cache of `tiny_data`, made by extract_features.py itself. Do not change it."""
    cache = tmp_path_factory.mktemp("tiny") / "cache"
    extract(tiny_data, tiny_data, cache)
    return cache


@pytest.fixture
def cache_copy(tiny_cache, tmp_path):
    """A copy of the small cache that a test may damage."""
    return Path(shutil.copytree(tiny_cache, tmp_path / "cache"))


def hashes(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of each file in a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Run a script's command line from an empty folder, in this process (torch loads once)."""

    def run(name: str, *flags: object) -> Finished:
        module = importlib.import_module(name.removesuffix(".py"))
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as status:
            cli.run(module.main, module.get_args_parser(), [str(flag) for flag in flags])
        return Finished(status.value.code, *capsys.readouterr())

    return run
