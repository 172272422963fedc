"""Fixtures: matrices with steep spectra, and a small cache of real photographs.

Fixtures import what loads transformers: the process that only hands out tests reads this file too,
and the others wait for it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small work; threads would fight over two cores

import hashlib
import importlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image

from common import arguments
from experiments import make_demo_data
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real

# flags of the smallest training
TRAIN = "--epochs 1 --rank 4 --oversample 2 --refine_steps 1 --hidden_dim 16".split()
# as in the published Qwen2.5-VL-3B-Instruct
QWEN_PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
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
    import extract_features

    argv = ["--demo", "--dataset_dir", str(data), "--cache_dir", str(cache), "--image_size", "112"]
    extract_features.main(arguments.parse(extract_features.get_args_parser(), argv + list(flags)))


def made_once(base: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Return folder `name` that the first of pytest's processes fills and all read.

    base: the basetemp of this process, which lies in the run's own where there are several.
    """
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = base / f"{name}-partial"
            make(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data set folder with 36 rows in the real schema, from real photographs."""

    def make(folder: Path) -> None:
        table = make_demo_data.build_table(seed=42, rows=TINY_ROWS)
        (folder / "data").mkdir(parents=True)
        make_demo_data.write_parquet(table, folder / "data" / "train-00000-of-00001.parquet")

    return made_once(tmp_path_factory.getbasetemp(), "tiny_data", make)


@pytest.fixture(scope="session")
def tiny_cache(tiny_data, tmp_path_factory):
    """A feature cache of `tiny_data`, made by extract_features.py itself. Do not change it."""

    def make(folder: Path) -> None:
        extract(tiny_data, tiny_data, folder / "cache")

    return made_once(tmp_path_factory.getbasetemp(), "tiny", make) / "cache"


@pytest.fixture(scope="session")
def ragged_cache(tiny_data, tmp_path_factory):
    """A cache of images of four grids: parts of real tokens of `tiny_data`. Do not change it.

    36 rows in 12 groups, D = 1536, grids 8 × 8 (the most frequent), 6 × 8, 8 × 6 and 4 × 5.
    """
    import tiny

    def make(folder: Path) -> None:
        extract(tiny_data, tiny_data, folder / "square", "--image_size", "224")
        tiny.write_ragged(folder / "cache", RealQwenVLDataset(folder / "square"))

    return made_once(tmp_path_factory.getbasetemp(), "ragged", make) / "cache"


@pytest.fixture
def cache_copy(tiny_cache, tmp_path):
    """A copy of the small cache that a test may damage."""
    return Path(shutil.copytree(tiny_cache, tmp_path / "cache"))


def hashes(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of each file in a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def save_qwen(folder: Path, width: int) -> Path:
    """Save a small Qwen2.5-VL checkpoint with features of `width`, as transformers does."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision |= {"out_hidden_size": width, "fullatt_block_indexes": [1], "window_size": 112}
    text = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=vision, text_config=text)
    )
    for parameter in model.model.visual.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_PREPROCESSOR))
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A Qwen2.5-VL checkpoint: T = 16 at 112 pixels, D = 64."""
    return save_qwen(tmp_path_factory.mktemp("checkpoint") / "small-qwen", width=64)


def picture(seed: int, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((70 + seed, 50), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def write_parquet(path: Path, columns: dict, types: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(v, (types or {}).get(name)) for name, v in columns.items()}
    pq.write_table(pa.table(arrays), path)


def manifest_of(cache: Path) -> dict:
    return json.loads((cache / "manifest.json").read_text())


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
            arguments.run(module.main, module.get_args_parser(), [str(flag) for flag in flags])
        return Finished(status.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def encode(qwen, tmp_path, script):
    """Run extract_features.py with the small checkpoint; returns what the script did."""

    def run(data, cache="cache", *flags):
        return script(
            "extract_features.py",
            "--dataset_dir",
            data,
            "--cache_dir",
            tmp_path / cache,
            "--model",
            qwen,
            "--image_size",
            112,
            *flags,
        )

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Everything that the program writes and reads, on tiny data. Do not change it."""
    import damage

    return damage.build(tmp_path_factory.mktemp("made"))


# ------------------------------------------------------------------- a head and its metric


@pytest.fixture(scope="session")
def dataset(tiny_cache):
    return RealQwenVLDataset(tiny_cache)


@pytest.fixture(scope="session")
def saliency(dataset):
    from heads.load_head import load_head

    return load_head("saliency", dataset, device="cpu")


@pytest.fixture(scope="session")
def metric_file(tiny_cache, tmp_path_factory):
    """The saliency head's metric of the small cache, made by experiments.estimate_metric itself."""
    from experiments import estimate_metric

    def make(folder: Path) -> None:
        path = folder / "saliency.safetensors"
        argv = ["--cache_dir", str(tiny_cache), "--probes", "2", "--out", str(path)]
        estimate_metric.main(arguments.parse(estimate_metric.get_args_parser(), argv))

    return made_once(tmp_path_factory.getbasetemp(), "metric", make) / "saliency.safetensors"


@pytest.fixture(scope="session")
def metric(metric_file, dataset):
    from heads.metric import load_metric

    return load_metric(metric_file, dataset)


@pytest.fixture(scope="session")
def test_batch(dataset):
    return next(iter(create_data_loaders_real(dataset, 6).test))


SAVEFIG = Figure.savefig


@pytest.fixture(scope="session", autouse=True)
def unpainted():
    """Leave figures unpainted: painting them takes most of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, path, **kwargs: Path(path).write_bytes(b"PNG"))
        yield


@pytest.fixture(autouse=True)
def painted(request, monkeypatch):
    """Paint the figures of a test that is marked so."""
    if request.node.get_closest_marker("painted"):
        monkeypatch.setattr(Figure, "savefig", SAVEFIG)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in order; laid out for a size, not painted, to save time."""
    figures: list[Figure] = []

    def record(figure, path, **kwargs):
        figures.append(figure)
        Path(path).write_bytes(b"not painted")

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def edit_manifest(cache, **changes):
    path = cache / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
