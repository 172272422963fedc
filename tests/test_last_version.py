"""What the last version wrote still opens and gives the numbers that it gave then."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from coding.factor_files import damaged_files, load_factors, read_factors
from coding.vision_tokens import VisionTokens
from qwenvl_dataloader import RealQwenVLDataset, normalise
from task.trained_norm import build_model
from training.checkpoint import load_model

FOLDER = Path(__file__).resolve().parent / "data" / "last_version"
FACTORS = ("fixed_bf16", "ranks_int8", "coded")
ROWS = [0, 7]


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


def test_the_kept_files_are_of_the_last_formats():
    for name in ("cache", *FACTORS):
        assert json.loads((FOLDER / name / "manifest.json").read_text())["format"] == 1


def test_a_feature_cache_of_format_1_opens_with_its_numbers(expected):
    dataset = RealQwenVLDataset(FOLDER / "cache")
    assert len(dataset) == 12 and dataset.grid == (4, 4) and dataset.verify() == {}
    assert torch.equal(dataset[ROWS], expected["features"])
    assert torch.equal(dataset.singular_values[ROWS], expected["singular_values"])
    assert dataset.thumbnail(7).size == (16, 16)


def test_a_codec_of_a_cache_of_one_grid_has_the_klt_and_tables_that_it_had(script, tmp_path):
    out = tmp_path / "codec.safetensors"
    done = script("experiments.fit_codec", "--cache_dir", FOLDER / "cache", "--out", out)
    assert done.returncode == 0, done.stderr
    found, kept = load_file(out), load_file(FOLDER / "coded" / "codec.safetensors")
    for name in ("rows", "statistics", "starts"):
        apart = found[name].int() - kept[name].int()
        assert apart.abs().max() <= 1, name  # of 1/64 octave, where a library rounds otherwise
    directions = kept["klt"].shape[1]  # it left one more out, and guessed no unseen energy
    klt = found["klt"][:, :directions].float()
    along = (klt * kept["klt"].float()).sum(0).abs()  # 1 but for the sign
    assert torch.allclose(along, torch.ones(directions), atol=0.01)


def test_a_checkpoint_of_the_last_version_gives_the_same_product(expected):
    model, state = load_model(FOLDER / "ResMLP" / "best_model.pt", torch.device("cpu"))
    assert state["config"]["rank"] == 4
    with torch.inference_mode():
        a, b = model(normalise(expected["features"])[0], 3)
    assert torch.allclose(a @ b, expected["model_at_rank_3"], atol=1e-4)


def test_a_task_network_whose_norm_had_no_branches_gives_the_same_product(expected):
    path = FOLDER / "task_network.safetensors"
    state = load_file(path)
    product = state.pop("A·B at rank 3")
    with safe_open(path, framework="pt") as file:
        model = build_model(json.loads(file.metadata()["config"]))
    model.load_state_dict(state)
    with torch.inference_mode():
        a, b = model(normalise(expected["features"])[0], 3)
    assert torch.allclose(a @ b, product, atol=1e-4)


@pytest.mark.parametrize("name", FACTORS)
def test_a_folder_of_factors_of_format_1_gives_the_tokens_that_it_gave(name, expected):
    folder = FOLDER / name
    assert damaged_files(folder) == []
    tokens = load_factors(folder, ROWS)
    assert torch.allclose(tokens, expected[name], atol=1e-5)
    read = read_factors(folder, ROWS)
    assert torch.allclose(read.a @ read.b * read.std + read.mean, expected[name], atol=1e-4)
    assert len(set(read_factors(folder).ranks.tolist())) == (1 if name == "fixed_bf16" else 4)
    rows = torch.cat(list(DataLoader(VisionTokens(folder), 4, num_workers=1)))
    assert rows.shape == (12, 16, 32) and torch.allclose(rows[ROWS], expected[name], atol=1e-5)
