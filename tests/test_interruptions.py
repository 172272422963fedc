"""What ends a command before its work is done: memory, Ctrl-C, another command in its folder."""

import argparse
import os
import shlex
import signal

import pytest
import torch

import train_real_data
from common import arguments
from lowrank_tokens import files as locks


def out_of_memory(**flags):
    typed = flags.pop("typed", set())
    args = argparse.Namespace(**flags, typed=typed)
    return arguments.mistake(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to"), args)


def test_out_of_memory_advises_half_the_batch_and_never_one_that_is_as_large():
    assert "try --batch_size 4" in out_of_memory(batch_size=8)
    assert "try --batch_size 1" in out_of_memory(batch_size=2)
    one = out_of_memory(batch_size=1)
    assert "try --batch_size" not in one and "--device cpu" in one and "smaller model" in one
    assert "--device cpu" in out_of_memory()


def test_out_of_memory_names_the_head_that_does_not_fit():
    for flag in ("task_head", "head"):
        message = out_of_memory(batch_size=1, **{flag: "qwen-answer"})
        assert "qwen-answer" in message and "try --batch_size" not in message
        assert "qwen-answer" in out_of_memory(batch_size=4, **{flag: "qwen-answer"})
    assert "head" not in out_of_memory(batch_size=1, task_head=None)


def test_out_of_memory_in_training_says_that_a_begun_run_takes_the_smaller_batch():
    assert "--resume last" in out_of_memory(batch_size=8, resume=None)
    # the run's own batch size is in its checkpoint and not in the flags
    message = out_of_memory(batch_size=8, resume="last")
    assert "smaller --batch_size than the run was begun with" in message and "8" not in message
    assert "try --batch_size 2" in out_of_memory(batch_size=4, resume="last", typed={"batch_size"})


def test_out_of_memory_ends_a_script_with_one_line(tiny_cache, script, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_real_data, "train", full)
    done = script("train_real_data.py", "--cache_dir", tiny_cache, "--rank", 4)
    assert done.returncode == 2 and "try --batch_size 4" in done.stderr


@pytest.mark.slow
def test_each_next_line_repeats_the_typed_flags_that_its_command_needs(
    tiny_cache, tmp_path, script, monkeypatch
):
    """Every such line is typed as it stands, from a folder without any default folder in it."""
    where = ["--cache_dir", tiny_cache, "--results_dir", tmp_path / "my results"]
    small = "--epochs 2 --rank 4 --oversample 2 --refine_steps 1 --hidden_dim 16".split()
    original, steps = train_real_data.train_step, []

    def train_step(*args):
        steps.append(os.kill(os.getpid(), signal.SIGTERM) if len(steps) == 4 else None)
        return original(*args)

    monkeypatch.setattr(train_real_data, "train_step", train_step)
    logs = ["--log_dir", tmp_path / "logs", "--device", "cpu"]
    done = script("train_real_data.py", *where, *logs, *small)
    assert done.returncode == 128 + signal.SIGTERM
    seen = []
    while " python " in (line := done.stdout.splitlines()[-1]):
        words = shlex.split(line.split(" python ", 1)[1])
        seen.append(words[0])
        words = words[1:] if words[0] == "-m" else words
        assert str(tmp_path / "my results") in words
        done = script(*words)
        assert done.returncode == 0, (line, done.stderr)
    assert seen == ["train_real_data.py", "compare_svd_nn.py", "visualize_svd_nn.py", "-m"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"my results", "logs"}  # nothing went to a default folder


@pytest.mark.parametrize("name", ["compare_svd_nn", "visualize_svd_nn"])
def test_ctrl_c_ends_with_130_and_one_line(name, script, monkeypatch):
    import compare_svd_nn
    import visualize_svd_nn

    def interrupted(args):
        raise KeyboardInterrupt

    module = {"compare_svd_nn": compare_svd_nn, "visualize_svd_nn": visualize_svd_nn}[name]
    monkeypatch.setattr(module, "open_trained", interrupted)
    done = script(name)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("name", ["compare_svd_nn.py", "visualize_svd_nn.py"])
def test_a_results_folder_has_one_writer(name, tiny_cache, tmp_path, script):
    where = ["--cache_dir", tiny_cache, "--results_dir", tmp_path / "results"]
    small = "--epochs 1 --rank 4 --oversample 2 --refine_steps 1 --hidden_dim 16".split()
    assert script("train_real_data.py", *where, "--log_dir", tmp_path, *small).returncode == 0
    folder = tmp_path / "results" / "ResMLP"
    before = {path.name for path in folder.iterdir()}
    with locks.sole_writer(folder, "--results_dir"):
        done = script(name, *where)
    assert done.returncode == 2 and "is being written by process" in done.stderr
    assert {path.name for path in folder.iterdir()} == before
    assert script(name, *where).returncode == 0
    assert not (folder / locks.LOCK_NAME).exists()
