"""Several processes that work as one, started by torchrun: the one module that knows
torch.distributed.

    torchrun --nproc_per_node 2 train_real_data.py --batch_size 4

`run` is what a script calls in place of `arguments.run`. Without torchrun nothing is joined, and
every function here answers as for one process. With it every process has to call the collectives
(gloo on the CPU, nccl between GPUs), in one order. A process that fails says so and ends; torchrun
ends the others.

rank: number of a process, 0 is the main one; world: how many there are, on all hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import arguments
from lowrank_tokens import files as locks
from lowrank_tokens import progress
from lowrank_tokens.exceptions import InputError

# Waits have no limit of their own: a process may encode for an hour while others are done. Where
# one has failed, torchrun ends those that wait.
NO_LIMIT = timedelta(days=30)

T = TypeVar("T")


# --------------------------------------------------------------------------- joining and leaving


def run(main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser) -> None:
    """Do what `arguments.run` does, for a script that torchrun may start: join, call `main`, leave.

    Each process prints its own error, one line and status 2 for a user's mistake, a traceback and 1
    for a programming error; torchrun then ends the others. All but the main process print nothing
    on stdout.
    """
    if not dist.is_torchelastic_launched():
        arguments.run(main, parser)
    store, rank, world = next(dist.rendezvous("env://"))  # torchrun's store outlives the processes
    if rank:
        sys.stdout = open(os.devnull, "w")
    args = arguments.parse(parser)
    try:
        device = _own_device(args.device)
        args = argparse.Namespace(**{**vars(args), "device": str(device)})
        # what is small (flags, errors per image) goes through gloo and waits for no GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=NO_LIMIT)
        flags = {k: v for k, v in vars(args).items() if k != "device"}
        check_same("was started with other flags or on another device", (device.type, flags))
        status = main(args) or 0
        barrier()
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except Exception as error:
        message = arguments.mistake(error, args)
        if message is None and _LOST.search(str(error)):
            message = f"process {rank} lost the others: see the first error"
        if message is None:
            traceback.print_exc()
            _leave(1)
        # tqdm's write leaves a bar whole
        tqdm.write(f"error: {arguments.one_line(message)}", file=sys.stderr)
        _leave(2)
    dist.destroy_process_group()
    _leave(status)


# what gloo and nccl say in a process whose peer has ended
_LOST = re.compile(r"gloo|closed by peer|Connection reset|NCCL|Socket", re.IGNORECASE)


def _leave(status: int) -> NoReturn:
    """End this process at once: an interpreter that shuts down over the group's threads can abort
    ("terminate called without an active exception", seen on a loaded machine)."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _own_device(name: str) -> torch.device:
    """Return the device of `--device` for this process: each has a GPU of its own."""
    device = arguments.pick_device(name)
    if device.type != "cuda":
        return device
    index, here = int(os.environ["LOCAL_RANK"]), local_world()
    if device.index is not None and here > 1:
        raise InputError(
            f"--device {name}: {here} processes cannot share a GPU, type --device cuda"
        )
    if device.index is None and here > torch.cuda.device_count():
        raise InputError(
            f"--nproc_per_node {here}: torch sees {torch.cuda.device_count()} CUDA devices here: "
            "start as many processes, or type --device cpu"
        )
    device = torch.device("cuda", index if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


# -------------------------------------------------------------------------------- who and how many


def rank() -> int:
    """Return the number of this process, 0 to world() − 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world() -> int:
    """Return the number of processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this process writes what is written once."""
    return rank() == 0


# ------------------------------------------------------------------------------------- collectives


def barrier() -> None:
    """Wait until all processes are here."""
    largest(0)


def largest(value: int) -> int:
    """Return the largest of all processes' values; waits for no GPU."""
    if world() == 1:
        return value
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def gather(value: T) -> list[T]:
    """Return all processes' values by rank, on all: anything that pickles, tensors on the CPU."""
    if world() == 1:
        return [value]
    values: list = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gather_columns(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join columns name → [n_i, …] of all processes, in order of rank: each [Σ n_i, …], on all.

    A process without rows (n_i = 0) may give an empty dict.
    """
    parts = [part for part in gather(columns) if part]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def from_main(value: T) -> T:
    """Return the main process's value on all: for decisions that must not differ in a last bit."""
    return gather(value)[0]


def check_same(what: str, value: object) -> None:
    """Raise InputError where a process has another value than the main one."""
    values = gather(value)
    differ = [str(i) for i, other in enumerate(values) if other != values[0]]
    if differ:
        raise InputError(
            f"process {', '.join(differ)} {what} than process 0: type the same command on all "
            "hosts, on the same files"
        )


@torch.no_grad()
def average_(tensors: Iterable[Tensor], share: float) -> None:
    """Replace each tensor t, in place, by Σ share · t over the processes; the shares add up to 1.

    One reduction for all tensors of a dtype. The result has the same bits on all processes.
    """
    if world() == 1:
        return
    tensors = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same]).mul_(share)
        dist.all_reduce(flat)
        for t, values in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(values.view(t.shape))


class Stop:
    """Within `with`, SIGINT and SIGTERM set a number that the loop asks for after each step.

    Processes hear a signal at different times, or one alone: `requested` tells all the same.
    """

    def __init__(self) -> None:
        self.heard = 0
        self.signal = 0  # what `requested` last found

    def __enter__(self) -> Stop:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.heard = number

    def requested(self) -> bool:
        """Return whether any process was asked to stop (all call it together)."""
        self.signal = largest(self.heard)
        return self.signal != 0


# ------------------------------------------------------------------------------------ sharing work


@contextlib.contextmanager
def sole_writer(folder: str | Path, flag: str) -> Iterator[None]:
    """Hold `locks.sole_writer` for all processes together: the main one has the lock."""
    with locks.sole_writer(folder, flag) if is_main() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the body first, then the others; all of them go on together."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
    barrier()


def own_part(items: list[T]) -> list[T]:
    """Return this process's part of the main process's list: every world-th, in the list's order.

    So the first item that is not done waits for none: all before it are.
    """
    return from_main(items)[rank() :: world()]


class Progress:
    """One `progress.bar` for what all processes do; leaving its `with` waits for all of them.

    The main process counts each of its own as one of every process, and the exact total at the end.
    """

    def __init__(self, total: int, desc: str, initial: int = 0) -> None:
        self.bar = progress.bar(total, desc, initial=initial, show=is_main())
        self.total = total

    def update(self, count: int) -> None:
        """Count `count` more of them as done by this process."""
        self.bar.update(min(count * world(), self.total - self.bar.n))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            barrier()
            self.bar.update(self.total - self.bar.n)
        self.bar.close()
