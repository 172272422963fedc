"""Several processes that work as one, started by torchrun: the one module that knows
torch.distributed.

    torchrun --nproc_per_node 2 train_real_data.py --batch_size 4

`run` is what a script calls in place of `cli.run`. Without torchrun nothing is joined, and every
function here answers as for one process. With it the processes share

- collectives (gloo on the CPU, nccl between GPUs): every process has to call them, in one order;
- torchrun's key-value store, which outlives them. A thread of each process waits there for the word
  that one of them failed, and ends its own process at once, wherever that stands: no process is
  left in a collective that another will never join, and only the main one prints the error.

rank: number of a process, 0 is the main one; world: how many there are, on all hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import cli, locks, progress
from common.errors import UserError

# Waits have no limit of their own: a process may encode for an hour while others are done, and one
# that fails ends them all through the store.
NO_LIMIT = timedelta(days=30)
END_TIME = timedelta(seconds=10)  # after which a process does not wait for the others to end

T = TypeVar("T")

_store: dist.Store | None = None  # torchrun's; None while there is one process only
_leaving = threading.Event()


# --------------------------------------------------------------------------- joining and leaving


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
) -> None:
    """`cli.run` for a script that torchrun may start: joins the others, calls `main`, leaves.

    Whatever ends one process ends all of them with its status: 2 and one line of the main process
    for a user's mistake, 130 for Ctrl-C, 1 and a traceback for a programming error. All but the
    main process are silent.
    """
    if not dist.is_torchelastic_launched():
        cli.run(main, parser, argv)
    _join()
    args = argparse.Namespace()
    try:
        args = _parse(parser, argv)
        device = _own_device(args.device)
        args = argparse.Namespace(**{**vars(args), "device": str(device)})
        _open_group(device)
        flags = {k: v for k, v in vars(args).items() if k != "device"}
        check_same("was started with other flags or on another device", (device.type, flags))
        status = main(args) or 0
        barrier()
        if status:  # at once, as after an error: an interpreter takes long to shut down
            _end_all(status)
    except KeyboardInterrupt:
        _end_all(128 + signal.SIGINT)
    except Exception as error:
        message = cli.mistake(error, args)
        if message is None:
            traceback.print_exc()
            _end_all(1)
        _end_all(2, f"error: {cli.one_line(message)}")
    _leaving.set()
    dist.destroy_process_group()
    # at once: an interpreter that shuts down over the watching thread can abort (seen once)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _join() -> None:
    global _store
    _store, rank, _ = next(dist.rendezvous("env://"))
    if rank:
        sys.stdout = open(os.devnull, "w")  # all print; the main process is heard
    # a connection of its own: a wait holds the connection
    threading.Thread(target=_watch, args=(_store.clone(), rank), daemon=True).start()


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    main = os.environ["RANK"] == "0"
    quiet = contextlib.nullcontext() if main else contextlib.redirect_stderr(sys.stdout)
    try:
        with quiet:
            return cli.parse(parser, argv)
    except SystemExit as end:  # a mistake or --help: all alike, printed by the main process
        _end_this(_store, end.code)


def _own_device(name: str) -> torch.device:
    """The device of `--device` for this process: each has a GPU of its own."""
    device = cli.pick_device(name)
    if device.type != "cuda":
        return device
    index, here = int(os.environ["LOCAL_RANK"]), local_world()
    if device.index is not None and here > 1:
        raise UserError(f"--device {name}: {here} processes cannot share a GPU, type --device cuda")
    if device.index is None and here > torch.cuda.device_count():
        raise UserError(
            f"--nproc_per_node {here}: torch sees {torch.cuda.device_count()} CUDA devices here: "
            "start as many processes, or type --device cpu"
        )
    device = torch.device("cuda", index if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def _open_group(device: torch.device) -> None:
    # what is small (flags, errors per image) goes through gloo and waits for no GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", _store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=NO_LIMIT,
    )


def _end_all(status: int, message: str = "") -> NoReturn:
    """End all processes with `status`; the main one prints `message`. The first call counts."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the end comes by itself, printed first
        signal.signal(number, signal.SIG_IGN)
    _store.compare_set("end", "", json.dumps([status, message]))
    while True:  # the watching thread ends this process
        threading.Event().wait()


def _watch(store: dist.Store, rank: int) -> None:
    """Body of the thread that ends this process when one of the group says so."""
    try:
        store.wait(["end"], NO_LIMIT)
        status, message = json.loads(store.get("end"))
        if rank == 0 and message:
            tqdm.write(message, file=sys.stderr)  # leaves a progress bar whole
        _end_this(store, status)
    except dist.DistError:  # torchrun was killed: nobody looks after this process any more
        if not _leaving.is_set():
            os._exit(1)


def _end_this(store: dist.Store, status: int) -> NoReturn:
    """End this process when all are about to, the main one having printed what there is to say.

    At once: the main thread may be in a collective. And with SIGTERM ignored: torchrun sends it to
    the others as soon as it sees one end, and must find them all with a status of their own.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # signal.signal is for the main thread alone, this may be the watching one
    ctypes.pythonapi.PyOS_setsig(signal.SIGTERM, ctypes.c_void_p(int(signal.SIG_IGN)))
    with contextlib.suppress(dist.DistError):  # a process that cannot hear is not waited for
        if store.add("ending", 1) == int(os.environ["WORLD_SIZE"]):
            store.set("all are ending", "")
        store.wait(["all are ending"], END_TIME)
    os._exit(status)


# -------------------------------------------------------------------------------- who and how many


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world() -> int:
    """Processes on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _store else 1


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return rank() == 0


# ------------------------------------------------------------------------------------- collectives


def barrier() -> None:
    """Wait until all processes are here."""
    largest(0)


def largest(value: int) -> int:
    """The largest of all processes' values; waits for no GPU."""
    if world() == 1:
        return value
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def gather(value: T) -> list[T]:
    """All processes' values (anything that pickles; tensors on the CPU), by rank, on all."""
    if world() == 1:
        return [value]
    values: list = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gather_columns(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Columns name → [n_i] of all processes, one after another by rank: each [Σ n_i], on all.

    A process without rows (n_i = 0) may give an empty dict.
    """
    parts = [part for part in gather(columns) if part]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def from_main(value: T) -> T:
    """The main process's value, on all: for decisions that must not differ in the last bit."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def check_same(what: str, value: object) -> None:
    """Raises UserError where a process has another value than the main one."""
    values = gather(value)
    differ = [str(i) for i, other in enumerate(values) if other != values[0]]
    if differ:
        raise UserError(
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
        """Whether any process was asked to stop (all call it together)."""
        self.signal = largest(self.heard)
        return self.signal != 0


# ------------------------------------------------------------------------------------ dealing work


@contextlib.contextmanager
def sole_writer(folder: str | Path, flag: str) -> Iterator[None]:
    """`locks.sole_writer` for all processes together: the main one holds the lock."""
    with locks.sole_writer(folder, flag) if is_main() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the body first, then the others do; all of them go on together."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
    barrier()


def deal(items: list[T]) -> Iterator[T]:
    """Each item to exactly one process, in the list's order, to whichever asks next.

    So an item's predecessors are done, or in the hands of a process that waits for none but theirs.
    The main process's list counts. Once in a process's life: the count is not started again.
    """
    if world() == 1:
        yield from items
        return
    items = from_main(items)
    while (index := _store.add("dealt", 1) - 1) < len(items):
        yield items[index]


class Progress:
    """One `progress.bar` for what all processes do; leaving its `with` waits for all of them."""

    def __init__(self, total: int, desc: str, initial: int = 0) -> None:
        self.bar = progress.bar(total, desc, initial=initial, show=is_main())
        self.initial = initial

    def update(self, count: int) -> None:
        """`count` more of them are done by this process."""
        if world() == 1:
            self.bar.update(count)
        else:
            self.bar.update(self.initial + _store.add("progress", count) - self.bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            barrier()
            self.update(0)
        self.bar.close()
