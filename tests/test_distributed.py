"""Several processes, started by the real torchrun, do what one process does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import extract, hashes

import extract_features
import factorize
import train_real_data
from common import arguments, processes
from experiments import estimate_metric, fit_codec
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.linalg import exact_factors
from model import even_features
from qwenvl_dataloader import EpochSampler, RealQwenVLDataset, create_data_loaders_real
from svd_baseline import evaluate
from training.checkpoint import load_checkpoint
from training.state import own_batch_size

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def torchrun(script, *flags, **options):
    """Start a script in two processes; the caller waits for it."""
    command = [*TORCHRUN, str(ROOT / script), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **options)


def finished(process):
    """Return the standard output of a group that has to end well."""
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout


def children(process):
    """Return the process ids of the group, which has begun its work."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def statuses(stderr):
    """Return the processes' exit statuses, from torchrun's summary of a group that failed."""
    return re.findall(r"exitcode +: (-?\d+)", stderr)


def in_process(module, *flags):
    args = arguments.parse(module.get_args_parser(), [str(flag) for flag in flags])
    assert not module.main(args)


# ------------------------------------------------------------------------ extraction and factors


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    """300 rows, three shards: 36 images, repeated within shards and between them, and two damaged
    ones."""
    table = pq.read_table(tiny_data / "data" / "train-00000-of-00001.parquet")
    images, rows = table["image"].to_pylist(), table.to_pylist()
    many = []
    for i in range(300):
        image = images[0 if i % 50 == 49 else i // 9]
        many.append(rows[i // 9] | {"question": f"question {i}", "image": image})
    for i in (3, 200):
        many[i]["image"] = {"bytes": b"no image", "path": None}
    folder = tmp_path_factory.mktemp("many")
    pq.write_table(pa.Table.from_pylist(many, schema=table.schema), folder / "a.parquet")
    return folder


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    """The cache that one process makes of it."""
    folder = tmp_path_factory.mktemp("alone") / "cache"
    extract(folder, data, folder, "--batch_size", "4")
    return folder


def extraction(data, cache):
    flags = ["--demo", "--dataset_dir", data, "--cache_dir", cache, "--image_size", "112"]
    return torchrun("extract_features.py", *flags, "--batch_size", "4")


@pytest.mark.slow
def test_two_processes_extract_the_bytes_of_one(data, cache, tmp_path):
    stdout = finished(extraction(data, tmp_path / "cache"))
    assert hashes(tmp_path / "cache") == hashes(cache)
    dataset = RealQwenVLDataset(tmp_path / "cache")
    assert len(dataset) == 298 and len(dataset.manifest["shards"]) > 2
    assert [entry["row_id"] for entry in dataset.manifest["skipped"]] == [3, 200]
    assert stdout.count("DEMO data, 300 rows") == stdout.count("manifest.json") == 1


@pytest.mark.slow
def test_two_processes_extract_images_of_any_size_into_the_bytes_of_one(data, tmp_path):
    where = ["--demo", "--dataset_dir", data, "--resize", "native", "--max_pixels", 12 * 28**2]
    where += ["--batch_tokens", 48, "--cache_dir"]
    in_process(extract_features, *where, tmp_path / "alone")
    finished(torchrun("extract_features.py", *where, tmp_path / "shared"))
    assert hashes(tmp_path / "shared") == hashes(tmp_path / "alone")
    assert RealQwenVLDataset(tmp_path / "shared").ragged


@pytest.mark.slow
def test_two_processes_import_the_bytes_of_one(tmp_path):
    (tmp_path / "old").mkdir()
    for i in range(150):  # two shards
        torch.save(torch.randn(4, 6), tmp_path / "old" / f"features_{i + (i > 70)}.pt")
    flags = ["--import_pt", tmp_path / "old", "--cache_dir"]
    in_process(extract_features, *flags, tmp_path / "alone")
    stdout = finished(torchrun("extract_features.py", *flags, tmp_path / "shared"))
    assert hashes(tmp_path / "shared") == hashes(tmp_path / "alone")
    assert stdout.count("features_71.pt missing") == stdout.count("150 files") == 1


@pytest.mark.slow
def test_processes_killed_while_they_extract_are_gone_on_with_by_one(data, cache, tmp_path):
    process = extraction(data, tmp_path / "cache")
    while not list((tmp_path / "cache").glob("part-*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert len(children(process)) == 2
    for pid in (process.pid, *children(process)):  # a machine that goes down ends all of them
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=20)  # the pipes close when all of them have ended
    assert not (tmp_path / "cache" / "manifest.json").exists()
    extract(tmp_path, data, tmp_path / "cache", "--batch_size", "4")
    assert hashes(tmp_path / "cache") == hashes(cache)


@pytest.mark.slow
def test_two_processes_write_the_factors_of_one(cache, tmp_path):
    where = ["--cache_dir", cache, "--results_dir", tmp_path / "results"]
    small = "--epochs 1 --rank 4 --oversample 2 --refine_steps 1 --hidden_dim 16".split()
    in_process(train_real_data, *where, "--log_dir", tmp_path, *small)
    flags = [*where, "--target_error", "0.6", "--dtype", "int8"]
    in_process(factorize, *flags, "--out", tmp_path / "alone")
    stdout = finished(torchrun("factorize.py", *flags, "--out", tmp_path / "shared"))
    assert hashes(tmp_path / "shared") == hashes(tmp_path / "alone")
    assert len(list((tmp_path / "shared").glob("factors-*"))) == 3
    assert stdout.count("matrices per second") == 1


@pytest.mark.slow
def test_two_processes_code_the_bytes_of_one_and_go_on_where_they_were_killed(cache, tmp_path):
    codec = tmp_path / "codec.safetensors"
    in_process(fit_codec, "--cache_dir", cache, "--out", codec)
    flags = ["--cache_dir", cache, "--exact", "--codec", codec, "--step", 8]
    in_process(factorize, *flags, "--out", tmp_path / "alone")
    shared = tmp_path / "shared"
    process = torchrun("factorize.py", *flags, "--out", shared)
    while not list(shared.glob("factors-*.json")):  # written after its shard, which it commits
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for pid in (process.pid, *children(process)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert not (shared / "manifest.json").exists()
    stdout = finished(torchrun("factorize.py", *flags, "--out", shared))
    assert hashes(shared) == hashes(tmp_path / "alone")
    assert stdout.count("images are already there") == stdout.count("bytes an image") == 1


# --------------------------------------------------------------------------------------- training

ALLOCATOR = "--use_rank_allocator --allocator_init_warmup 3 --allocator_final_warmup 6 "
ALLOCATOR += "--allocator_mask_interval 2 --allocator_keep_ratio 0.5"
RUN = "--arch AdaLoRA --rank 6 --oversample 2 --hidden_dim 16 "
RUN = [*(RUN + ALLOCATOR).split(), "--lr", "1e-3", "--patience", "50"]


def files(cache, folder):
    return ["--cache_dir", cache, "--results_dir", folder / "results", "--log_dir", folder / "log"]


def history_of(folder, arch="AdaLoRA"):
    return json.loads((folder / "results" / arch / "history.json").read_text())


def close(found, expected):
    """Say whether histories agree within rounding, timings aside."""
    for a, b in zip(found, expected, strict=True):
        for name in a.keys() - {"seconds", "samples_per_s"}:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-9), (b["epoch"], name)


@pytest.fixture(scope="module")
def alone(tiny_cache, tmp_path_factory):
    """A run of one process: 24 images in steps of 10, 10 and 4."""
    folder = tmp_path_factory.mktemp("train_alone")
    flags = [*RUN, "--epochs", "8", "--batch_size", "10"]
    in_process(train_real_data, *files(tiny_cache, folder), *flags)
    return folder


@pytest.mark.slow
def test_two_processes_with_half_the_batch_train_the_network_of_one(alone, tiny_cache, tmp_path):
    flags = [*files(tiny_cache, tmp_path), *RUN, "--epochs", "8", "--batch_size", "5"]
    stdout = finished(torchrun("train_real_data.py", *flags))
    close(history_of(tmp_path), history_of(alone))
    paths = [d / "results" / "AdaLoRA" / "last_model.pt" for d in (tmp_path, alone)]
    shared, one = (load_checkpoint(path)["model"] for path in paths)
    assert torch.equal(shared["rank_mask"], one["rank_mask"]) and shared["rank_mask"].sum() == 3
    for name in shared.keys() - {"rank_mask", "narrowed"}:
        assert torch.allclose(shared[name], one[name], rtol=1e-3, atol=1e-5), name
    # one set of files, one voice
    assert {p.name for p in paths[0].parent.iterdir()} == {
        p.name for p in paths[1].parent.iterdir()
    }
    assert len(list((tmp_path / "log").iterdir())) == 1
    assert stdout.count("epoch    8 ") == stdout.count("2 processes, 5 images a step each") == 1


@pytest.mark.slow
def test_two_processes_train_for_a_task_as_one_does(tiny_cache, tmp_path):
    metric = tmp_path / "metric.safetensors"
    in_process(
        estimate_metric,
        "--cache_dir",
        tiny_cache,
        "--probes",
        "1",
        "--shrinkage",
        "1e-2",
        "--out",
        metric,
    )
    small = "--epochs 1 --rank 4 --oversample 2 --hidden_dim 16 --task_head saliency".split()
    small += ["--metric", metric]
    one, two = tmp_path / "one", tmp_path / "two"
    in_process(train_real_data, *files(tiny_cache, one), *small, "--batch_size", "8")
    finished(torchrun("train_real_data.py", *files(tiny_cache, two), *small, "--batch_size", "4"))
    paths = [folder / "results" / "ResMLP" / "history.json" for folder in (one, two)]
    found = [[r["val_task_error"] for r in json.loads(path.read_text())] for path in paths]
    assert found[1] == pytest.approx(found[0], rel=1e-3) and len(found[0]) == 2


@pytest.mark.slow
def test_two_processes_choose_the_features_of_one(tiny_cache, tmp_path):
    small = "--epochs 1 --rank 4 --oversample 2 --refine_steps 0 --hidden_dim 16".split()
    one, two = tmp_path / "one", tmp_path / "two"
    in_process(train_real_data, *files(tiny_cache, one), *small, "--batch_size", "8")
    finished(torchrun("train_real_data.py", *files(tiny_cache, two), *small, "--batch_size", "4"))
    selected = [
        load_checkpoint(folder / "results" / "ResMLP" / "last_model.pt")["model"]["selected"]
        for folder in (one, two)
    ]
    assert torch.equal(*selected)
    assert not torch.equal(selected[0], even_features(1536, 16))
    close(history_of(two, "ResMLP"), history_of(one, "ResMLP"))


@pytest.mark.slow
def test_an_interrupted_run_of_two_processes_goes_on_in_one(alone, tiny_cache, tmp_path):
    where = files(tiny_cache, tmp_path)
    process = torchrun("train_real_data.py", *where, *RUN, "--epochs", "400", "--batch_size", "5")
    while not process.stdout.readline().startswith("epoch    2"):
        assert process.poll() is None, process.communicate()
    os.kill(children(process)[1], signal.SIGINT)  # one hears it, all stop after the same step
    stdout, stderr = process.communicate(timeout=60)
    assert stdout.count("stopped by signal 2") == 1
    assert "130" in statuses(stderr)  # of the first to leave; torchrun then ends the others
    last = tmp_path / "results" / "AdaLoRA" / "last_model.pt"
    state = load_checkpoint(last)
    assert state["processes"] == 2 and len(state["other_rng"]) == 1
    assert not torch.equal(state["rng"]["cpu"], state["other_rng"][0]["cpu"])
    progress = state["progress"]
    close(history_of(tmp_path)[:9], history_of(alone)[: len(history_of(tmp_path))])
    state["progress"]["last_epoch"] = state["args"]["epochs"] = progress["epoch"] + 1
    torch.save(state, last)
    in_process(train_real_data, *where, "--arch", "AdaLoRA", "--resume", "last")
    assert load_checkpoint(last)["args"]["batch_size"] == 10
    expected = history_of(alone)
    both = min(len(expected), len(history_of(tmp_path)))
    close(history_of(tmp_path)[:both], expected[:both])


def test_a_run_is_not_resumed_by_processes_that_cannot_share_its_steps(monkeypatch):
    state = {"args": {"batch_size": 4}, "processes": 2}
    for world, size in ((1, 8), (4, 2), (8, 1)):
        monkeypatch.setattr(processes, "world", lambda world=world: world)
        assert own_batch_size(state, Path("last_model.pt")) == size
    monkeypatch.setattr(processes, "world", lambda: 3)
    with pytest.raises(InputError, match="8 images a step, which 3 .* 1, 2, 4, 8 processes"):
        own_batch_size(state, Path("last_model.pt"))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_steps_of_one_and_weigh_their_images_alike(world):
    rows = torch.arange(100, 126)  # 26 rows in steps of 12: the last has 2
    one = EpochSampler(rows, 12, shuffle_seed=5)
    samplers = [EpochSampler(rows, 12 // world, 5, (rank, world)) for rank in range(world)]
    assert {len(sampler) for sampler in samplers} == {len(one)} == {3}
    for whole, *parts in zip(one, *(s.shares() for s in samplers), strict=True):
        own = [part.rows for part in parts if part.share > 0]
        assert sum(own, []) == whole
        assert all(part.rows for part in parts)  # a network has no gradient of no image
        assert all(part.images == len(whole) for part in parts)
        assert [p.share for p in parts if p.share] == [len(rows) / len(whole) for rows in own]


def test_processes_share_the_validation_images_also_where_some_get_none(tiny_cache):
    dataset = RealQwenVLDataset(tiny_cache)
    parts = [create_data_loaders_real(dataset, 4, part=(rank, 7)).val for rank in range(7)]
    rows = [torch.cat([b.rows for b in part]).tolist() if len(part) else [] for part in parts]
    assert sum(rows, []) == dataset.split.val.tolist() and rows[6] == []
    assert evaluate(lambda x: exact_factors(x, 2), parts[6]) == {}


# --------------------------------------------------------------------------------------- mistakes


def assert_one_line(process, message):
    """A group that failed: one line of each process that found the mistake, and no traceback."""
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stdout == ""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert any(message in line for line in lines)
    assert all(message in line or "lost the others" in line for line in lines)
    assert "2" in statuses(stderr)
    assert stderr.count("Traceback") == 1  # torchrun's own


@pytest.mark.slow
def test_a_mistake_is_one_line_of_each_process(tmp_path):
    flags = ["--cache_dir", tmp_path / "nowhere", "--results_dir", tmp_path / "results"]
    process = torchrun("train_real_data.py", *flags, "--log_dir", tmp_path / "log")
    assert_one_line(process, "nowhere does not exist")
    assert not list(tmp_path.iterdir())


FAILS_ON_ONE = """
import argparse, sys, time
sys.path.insert(0, {root!r})
from common import arguments, processes
from lowrank_tokens.exceptions import InputError

def main(args):
    if processes.rank() == 1:
        if args.how == "mistake":
            raise InputError("the disk of the other host is full")
        raise ZeroDivisionError("a bug")
    time.sleep(600) if args.how == "mistake" else processes.barrier()

parser = arguments.Parser("")
parser.add_argument("how", choices=("mistake", "bug"))
parser.add_argument("--device", default="cpu")
processes.run(main, parser)
"""


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others_wherever_they_are(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FAILS_ON_ONE.format(root=str(ROOT)))
    mistake, bug, typed = (torchrun(script, how) for how in ("mistake", "bug", "else"))
    assert_one_line(mistake, "the disk of the other host is full")
    assert_one_line(typed, "invalid choice: 'else'")
    _, stderr = bug.communicate(timeout=60)
    assert stderr.count("ZeroDivisionError: a bug") == 1 and stderr.count("Traceback") == 2
    assert "1" in statuses(stderr)


def test_scripts_of_one_process_refuse_torchrun(script, monkeypatch):
    monkeypatch.setitem(os.environ, "TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    done = script("compare_svd_nn.py")
    assert done.returncode == 2 and "without torchrun" in done.stderr
