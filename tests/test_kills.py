"""A run that is killed in any write loses nothing: what it left is whole, and the next start ends
with the files of a run that nobody killed, byte for byte."""

import hashlib
import json
import shutil
from itertools import count

import pytest
import tiny
from damage import digest
from forked import POINTS, command, forked, killed

import extract_features
import factorize
import train_real_data
from experiments import fit_codec
from lowrank_tokens import shards as shard_folder
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import read_factors
from lowrank_tokens.files import LOCK_NAME
from qwenvl_dataloader import RealQwenVLDataset
from training.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("drawn")]

TRAIN = "--epochs 2 --rank 4 --hidden_dim 16 --batch_size 8 --lr 1e-3 --dropout 0.2 --device cpu"
ARCHITECTURES = {
    "ResMLP": "--refine_steps 1 --oversample 2",
    "AdaLoRA": "--factors direct --use_rank_allocator --allocator_init_warmup 2 "
    "--allocator_final_warmup 4 --allocator_mask_interval 2 --allocator_keep_ratio 0.5",
}
FIGURES = [f"{name}.png" for name in ("train_val_loss_comparison", "loss_curves", "error_heatmap")]


@pytest.fixture
def cache(tmp_path):
    return tiny.write_cache(tmp_path / "cache", tiny.steep_tokens(40))


def kills(run):
    """Kill `run` in its first write, its second, …; yields until it has no more of them."""
    for nth in count(1):
        outcome = killed(run, nth, POINTS[nth % 3])
        if outcome.status != -9:
            assert outcome.status == 0 and nth > 3, outcome
            return
        yield


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != LOCK_NAME
    }


def check_whole(folder):
    """Checkpoints load and JSON parses."""
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            load_checkpoint(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def finished_training(folder):
    """A digest of history, weights, optimiser, random numbers, allocator and test numbers."""
    assert all((folder / name).exists() for name in FIGURES)
    assert not list(folder.glob(".*tmp*"))
    states = [load_checkpoint(folder / name) for name in ("best_model.pt", "last_model.pt")]
    kept = [{k: v for k, v in state.items() if k not in ("args", "log_dir")} for state in states]
    texts = [json.loads((folder / n).read_text()) for n in ("history.json", "test_results.json")]
    return digest(without_times([kept, texts]))


def without_times(value):
    if isinstance(value, dict):
        times = ("seconds", "samples_per_s")
        return {key: without_times(item) for key, item in value.items() if key not in times}
    return [without_times(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_training_killed_in_any_write_resumes_to_the_unbroken_run(arch, cache, tmp_path):
    results = tmp_path / "results"
    where = ["--arch", arch, "--cache_dir", cache, "--log_dir", tmp_path / "log"]
    flags = [*TRAIN.split(), *ARCHITECTURES[arch].split()]
    unbroken = command(train_real_data, *where, *flags, "--results_dir", tmp_path / "unbroken")
    assert forked(unbroken).status == 0
    expected = finished_training(tmp_path / "unbroken" / arch)

    where += ["--results_dir", results]
    run = command(train_real_data, *where, *flags)
    resume = command(train_real_data, *where, "--resume", "last")
    for _ in kills(run):
        check_whole(results)
        finished = (results / arch / "test_results.json").exists()
        if (results / arch / "last_model.pt").exists():
            assert forked(resume).status == (2 if finished else 0)
        else:
            assert forked(run).status == 0
        assert finished_training(results / arch) == expected
        shutil.rmtree(results)


def test_a_fresh_run_killed_over_old_results_keeps_every_byte_of_them(cache, tmp_path):
    where = ["--cache_dir", cache, "--results_dir", tmp_path / "results"]
    run = command(train_real_data, *where, "--log_dir", tmp_path / "log", *TRAIN.split())
    assert forked(run).status == 0
    old = shutil.copytree(tmp_path / "results", tmp_path / "old")
    for _ in kills(run):
        kept = {path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}
        assert {path.read_bytes() for path in old.rglob("*") if path.is_file()} <= kept
        shutil.rmtree(tmp_path / "results")
        shutil.copytree(old, tmp_path / "results")


def check_cache(folder):
    """A cache opens and is as its hashes say, or says in words that it is unfinished."""
    try:
        assert RealQwenVLDataset(folder).verify() == {}
    except InputError as error:
        assert "interrupted" in str(error) or "does not exist" in str(error)
        assert not (folder / "manifest.json").exists()


def check_factors(folder):
    """Factors are read whole, or the folder is unfinished."""
    try:
        read_factors(folder)
    except InputError:
        assert not (folder / "manifest.json").exists()


def killed_and_started_again(run, folder, check):
    """Kill a command in each of its writes; the same command again makes the unbroken files."""
    assert forked(run).status == 0
    expected = hashes(folder)
    shutil.rmtree(folder)
    for _ in kills(run):
        check(folder)
        finished = (folder / "manifest.json").exists()
        assert forked(run).status == (2 if finished else 0)
        assert hashes(folder) == expected
        shutil.rmtree(folder)


def test_extraction_killed_in_any_write_goes_on_to_the_unbroken_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 8)
    monkeypatch.setattr(extract_features, "load_encoder", lambda *_, **__: tiny.TinyEncoder())
    images = [tiny.jpeg(i) for i in range(30)]
    images[7], images[8], images[20] = images[3], b"no image", images[3]
    data = tiny.write_data_set(tmp_path / "images", images)
    where = ["--dataset_dir", data, "--cache_dir", tmp_path / "cache", "--device", "cpu"]
    run = command(extract_features, *where, "--batch_size", 4)
    killed_and_started_again(run, tmp_path / "cache", check_cache)


@pytest.mark.parametrize(
    "flags",
    ["--rank 3", "--target_error 0.3 --dtype int8", "--exact --step 0.5 --codec codec.safetensors"],
)
def test_factorisation_killed_in_any_write_goes_on_to_the_unbroken_factors(
    flags, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 8)
    monkeypatch.chdir(tmp_path)
    where = ["--cache_dir", cache, "--results_dir", "results"]
    train = command(train_real_data, *where, "--log_dir", "log", *TRAIN.split())
    assert forked(train).status == 0
    fit = command(fit_codec, "--cache_dir", cache, "--out", "codec.safetensors")
    assert forked(fit).status == 0
    run = command(factorize, *where, "--out", "factors", *flags.split())
    killed_and_started_again(run, tmp_path / "factors", check_factors)
