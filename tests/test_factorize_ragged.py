"""factorize.py on a cache of images of several grids."""

import json
import math

import pytest
import tiny
import torch
from conftest import TRAIN, hashes

import factorize
from lowrank_tokens import shards as shard_folder
from lowrank_tokens.cache_writer import FeatureCacheWriter
from lowrank_tokens.codec import Codec
from lowrank_tokens.errors import rel_error
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import VisionTokens, load_factors, read_factors
from lowrank_tokens.linalg import normalise
from model import get_model_by_name
from qwenvl_dataloader import RealQwenVLDataset
from training.checkpoint import load_model

RANK = 24  # more than the 20 tokens of the smallest images


@pytest.fixture(scope="module")
def results(ragged_cache, tmp_path_factory):
    """A ResMLP of rank 24, trained on the 8 x 8 parts of the same photographs."""
    import train_real_data
    from common import arguments

    folder = tmp_path_factory.mktemp("of_one_grid")
    ragged = RealQwenVLDataset(ragged_cache)
    square = RealQwenVLDataset(ragged_cache.parent / "square")
    names = ("kind", "encoder", "dataset_sha256", "feature_dim", "split_by", "versions")
    header = {name: ragged.manifest[name] for name in names}
    header |= {"resize": "native", "num_tokens": 64, "grid": [8, 8]}
    writer = FeatureCacheWriter(folder / "cache", header | {"resize": "stretch"}, len(square))
    parts = square[range(36)].unflatten(1, square.grid)[:, :8, :8].flatten(1, 2)
    rows = [tiny.part_of_row(square, i, (8, 8)) for i in range(36)]
    for shard in writer.shards:
        own = slice(writer.rows_of(shard).start, writer.rows_of(shard).stop)
        writer.write_shard(shard, parts[own], rows[own], [])
    writer.finish()
    where = ["--cache_dir", folder / "cache", "--results_dir", folder, "--log_dir", folder / "log"]
    argv = [str(a) for a in (*where, *TRAIN, "--rank", RANK)]
    assert train_real_data.main(arguments.parse(train_real_data.get_args_parser(), argv)) == 0
    return folder


@pytest.fixture
def write(script, ragged_cache, results, tmp_path):
    def run(*flags, status=0):
        argv = ["--cache_dir", ragged_cache, "--results_dir", results, "--out", tmp_path / "out"]
        done = script("factorize.py", *argv, *flags)
        assert done.returncode == status, done.stderr
        return done

    return run


def raw_errors(folder, dataset):
    """raw_error of each image as VisionTokens reads it, and that it has the image's grid."""
    tokens, errors = VisionTokens(folder), []
    for row, grid in enumerate(dataset.grids):
        raw = dataset[[row]][0].float()
        assert tokens.grid_of(row) == grid and tokens[row].shape == raw.shape
        errors.append(float((tokens[row] - raw).norm() / raw.norm()))
    return errors


def test_each_image_has_the_factors_of_its_own_grid_and_at_most_its_own_rank(
    write, ragged_cache, results, tmp_path
):
    done = write("--dtype", "float32")
    assert done.stdout.count("note: 7 images have fewer tokens than rank 24") == 1
    dataset = RealQwenVLDataset(ragged_cache)
    model, _ = load_model(results / "ResMLP" / "best_model.pt", torch.device("cpu"))
    for row in (0, 1, 3, 4):
        grid = dataset.grids[row]
        x = normalise(dataset[[row]])[0]
        with torch.inference_mode():
            a, b = model(x, RANK, grid=grid)
        read = read_factors(tmp_path / "out", [row])
        assert read.ranks.tolist() == [min(RANK, math.prod(grid))]
        assert torch.allclose(read.a @ read.b, a @ b, atol=1e-3)
    errors = raw_errors(tmp_path / "out", dataset)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    mean = manifest["errors"]["rel_error_original"]["mean"]
    assert sum(errors) / 36 == pytest.approx(mean, rel=1e-4)
    same = [row for row, grid in enumerate(dataset.grids) if grid == (6, 8)]
    assert load_factors(tmp_path / "out", same).shape == (7, 48, 1536)
    with pytest.raises(InputError, match="do not stack.*VisionTokens"):
        load_factors(tmp_path / "out")


def test_a_target_is_met_by_images_of_every_grid(write, ragged_cache, tmp_path):
    write("--target_error", 0.3, "--dtype", "int8")
    dataset, ranks = RealQwenVLDataset(ragged_cache), set()
    for row in range(36):
        read = read_factors(tmp_path / "out", [row])
        assert rel_error(normalise(dataset[[row]])[0], read.a, read.b) <= 0.3
        ranks |= set(read.ranks.tolist())
    assert len(ranks) > 2


@pytest.mark.slow
@pytest.mark.parametrize("coded", [False, True])
def test_a_ragged_cache_is_gone_on_with_to_the_same_bytes_coded_or_not(
    coded, write, script, ragged_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 10)
    flags, owner, name = ["--batch_size", 2], factorize, "factorise"
    if coded:
        codec = tmp_path / "codec.safetensors"
        done = script("experiments.fit_codec", "--cache_dir", ragged_cache, "--out", codec)
        assert "training images of 4 grids" in done.stdout, done.stderr
        flags = ["--exact", "--codec", codec, "--target_error", 0.25]
        owner, name = Codec, "coded_image"
    write(*flags)
    whole = hashes(tmp_path / "out")
    errors = raw_errors(tmp_path / "out", RealQwenVLDataset(ragged_cache))
    if coded:
        assert max(errors) <= 0.25 + 1e-6
    function, calls = getattr(owner, name), []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) > 17:
            raise KeyboardInterrupt
        return function(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        write(*flags, "--overwrite", status=130)
    assert "images are already there" in write(*flags).stdout
    assert hashes(tmp_path / "out") == whole


def test_the_network_s_factors_of_every_grid_are_coded(write, script, ragged_cache, tmp_path):
    codec = tmp_path / "codec.safetensors"
    script("experiments.fit_codec", "--cache_dir", ragged_cache, "--out", codec)
    errors = []
    for flags in ([], ["--exact"]):
        write("--codec", codec, "--step", 4, *flags, "--overwrite")
        found = raw_errors(tmp_path / "out", RealQwenVLDataset(ragged_cache))
        errors.append(sum(found) / len(found))
    assert abs(errors[0] / errors[1] - 1) < 0.3, errors


def test_direct_factors_are_refused_on_another_grid_and_nothing_is_written(ragged_cache):
    dataset = RealQwenVLDataset(ragged_cache)
    shape = {"input_dim": 1536, "num_tokens": 64, "rank": 4, "grid": (8, 8)}
    model = get_model_by_name("ResMLP", **shape, hidden_dim=8, factors="direct")
    with pytest.raises(InputError, match="direct factors are tied to the grid"):
        factorize.factorise(model, dataset[[1]], (6, 8), 4, None, "bf16")
