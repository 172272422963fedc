"""Files made to do harm: code in checkpoints, names that lead elsewhere, endless images."""

import ast
import copy
import hashlib
import io
import json
import os
import random
import resource
import shutil
import warnings
import zlib
from pathlib import Path

import pytest
import tiny
import torch
from commands import MODULES
from PIL import Image

import extract_features
from encoders import extraction
from encoders.image_sources import ImageCell
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import load_factors
from qwenvl_dataloader import RealQwenVLDataset
from training.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_in_which_code_is_hidden_is_refused_and_runs_none(made, tmp_path, script):
    results = Path(shutil.copytree(made["best_model.pt"].folder.parent, tmp_path / "results"))
    state = load_checkpoint(results / "ResMLP" / "best_model.pt")
    for key in ("args", "optimizer", "format"):
        torch.save({**state, key: Payload(tmp_path / "owned")}, results / "ResMLP/best_model.pt")
        for name in (
            "compare_svd_nn.py",
            "visualize_svd_nn.py",
            "factorize.py",
            "experiments.benchmark",
        ):
            where = ["--cache_dir", made["manifest.json"].folder, "--results_dir", results]
            done = script(name, *where)
            assert done.returncode == 2 and "best_model.pt is damaged" in done.stderr
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("change", [{"rank": 10**9}, {"rank": "4"}, {"arch": "x"}, {"y": 1}])
def test_a_checkpoint_that_describes_another_model_is_refused(change, made, tmp_path, script):
    results = Path(shutil.copytree(made["best_model.pt"].folder.parent, tmp_path / "results"))
    path = results / "ResMLP" / "best_model.pt"
    state = load_checkpoint(path)
    save_checkpoint(path, {**state, "config": {**state["config"], **change}})
    where = ["--cache_dir", made["manifest.json"].folder, "--results_dir", results]
    done = script("compare_svd_nn.py", *where)
    assert done.returncode == 2 and "describes another model than it holds" in done.stderr


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/../b", "a\0b"])
@pytest.mark.parametrize("which", ["manifest.json", "factors manifest.json"])
def test_no_name_in_a_manifest_leads_outside_its_folder(which, name, made, tmp_path):
    folder = Path(shutil.copytree(made[which].folder, tmp_path / "inside"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("shards", "rows", "singular_values"):
        if isinstance(manifest.get(key), dict | list) and key in manifest:
            changed = copy.deepcopy(manifest)
            entry = changed[key][0] if key == "shards" else changed[key]
            if "file" not in entry:
                continue
            entry["file"] = name
            (folder / "manifest.json").write_text(json.dumps(changed))
            with pytest.raises(InputError):
                (RealQwenVLDataset if which == "manifest.json" else load_factors)(folder)


def bomb(side: int) -> bytes:
    """Return a PNG of side × side pixels in a few hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        sum_ = zlib.crc32(kind + body)
        return len(body).to_bytes(4, "big") + kind + body + sum_.to_bytes(4, "big")

    size = side.to_bytes(4, "big")
    head = chunk(b"IHDR", size + size + b"\x08\x02\0\0\0")
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def test_an_image_that_would_fill_the_memory_is_skipped_and_listed(tmp_path, script, monkeypatch):
    images = [tiny.jpeg(i) for i in range(5)]
    images[1] = bomb(30_000)
    data = tiny.write_data_set(tmp_path / "images", images)
    monkeypatch.setattr(extract_features, "load_encoder", lambda *_, **__: tiny.TinyEncoder())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = script("extract_features.py", "--dataset_dir", data, "--cache_dir", "cache")
    assert done.returncode == 0, done.stderr
    assert "skipped row 1" in done.stdout and "decompression bomb" in done.stdout
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # KiB; it has 2.7 GB


def test_damaged_images_of_any_kind_are_listed_and_do_not_end_an_extraction(tmp_path):
    rng = random.Random(0)
    picture = Image.open(io.BytesIO(tiny.jpeg(3, (60, 40))))
    sources = []
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA"):
        file = io.BytesIO()
        picture.save(file, kind)
        sources.append(file.getvalue())
    encoder = tiny.TinyEncoder()
    for _ in range(400):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        data = bytes(data[: rng.randint(1, 2 * len(data))])
        row = {"image": ImageCell(data, None)}
        look = extraction.Look(hashlib.sha256(data).hexdigest(), (4, 4), "group")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
            sample = extraction.prepare_row(0, row, encoder, look, 0)
        assert sample.reason is None or sample.reason.startswith("unreadable image: ")
        assert sample.reason is None or "0x" not in sample.reason


def test_no_source_can_run_code_from_a_file():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                if names == ["UnpicklingError", "pickle"]:  # the name of an error runs nothing
                    continue
                assert not {"pickle", "dill", "joblib", "shelve"} & set(names), path.name
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path.name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec"), path.name
                if called == "torch.load":
                    safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert safe.get("weights_only") == "True", path.name
                if called in ("np.load", "numpy.load"):
                    allowed = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert allowed.get("allow_pickle", "False") == "False", path.name
