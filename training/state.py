"""The state of a training run: how it begins, how it goes on, and all that a checkpoint keeps."""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common import arguments, processes
from heads.metric import check_head, load_metric
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import first_difference, read_json
from model import LowRankFactorModel, ModelConfig, build_model
from qwenvl_dataloader import BatchLoader, RealQwenVLDataset
from svd_baseline import second_moment
from training.checkpoint import (
    cache_identity,
    load_checkpoint,
    rng_state,
    set_rng_state,
)
from training.rank_allocator import RankAllocator
from training.trained_norm import TaskFactorModel
from training.unseen import fitted_images

if TYPE_CHECKING:
    from heads.task_head import TaskHead

SHIFT_LR_FACTOR = 20  # a shift must move by tenths while weights move by thousandths
# terms of the loss that are summed over an epoch (model.LossTerms)
TERMS = ("reconstruction", "mse", "optimum_mse", "B", "ortho", "act", "lora_ortho", "task")
# what a checkpoint has of TrainState's fields
PROGRESS = """last_epoch epoch batches_done step best best_epoch bad_epochs finished sums
    history""".split()
# flags that may differ from the run that is resumed; --lr wins where typed
FREE_ON_RESUME = {"arch", "resume", "epochs", "lr", "patience", "results_dir", "cache_dir"}
FREE_ON_RESUME |= {"log_dir", "device", "tensorboard", "batch_size"}


@dataclass
class TrainState:
    """Everything that changes while a run trains; `checkpoint` returns all of it."""

    args: argparse.Namespace
    model: LowRankFactorModel
    optimizer: torch.optim.AdamW
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    allocator: RankAllocator | None
    identity: dict
    last_epoch: int
    epoch: int = 1  # the epoch that is being trained
    batches_done: int = 0  # of that epoch
    step: int = 0  # optimiser steps since the start
    best: float = float("inf")  # least `selection_score` on validation images
    best_epoch: int = 0  # 0: the untrained model, or (best is infinite) none yet
    bad_epochs: int = 0
    finished: bool = False
    fresh: bool = True  # nothing written yet: results of an earlier run are still in the folder
    sums: Tensor | None = None  # of the loss terms over the epoch's images so far, float64
    history: list[dict] = field(default_factory=list)
    head: TaskHead | None = None  # frozen; what --task_head trains for
    start: dict | None = None  # checkpoint of the untrained model, not yet written
    images: dict = field(default_factory=dict)  # trained or validated on: hashes and groups
    note: str = ""  # what --resume changed, for the log
    cuts_history: bool = False  # the folder's history has later epochs, which the next save ends

    def checkpoint(self) -> dict:
        """Return all that is needed to go on exactly here.

        Several processes have to call it together: each hands in its generators' state.
        """
        rng = processes.gather(rng_state())
        return {
            "config": asdict(self.model.config),
            "norm": self.model.norm,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "allocator": self.allocator.state_dict() if self.allocator else None,
            "rng": rng[0],
            "other_rng": rng[1:],  # of the processes beside the main one
            "processes": processes.world(),
            "progress": {name: getattr(self, name) for name in PROGRESS},
            "args": {k: v for k, v in vars(self.args).items() if k != "typed"},
            "cache": self.identity,
            "images": self.images,
        }

    def selection_score(self, record: dict) -> float:
        """Return the number on validation images whose smallest value marks the best epoch.

        It is the mean squared error above the optimum's; with a head, the head's loss.
        """
        if self.head:
            return record["val_task_loss"]
        return record["val_mse"] - record["val_optimum_mse"]

    def keep_start(self) -> None:
        """Make the untrained model, the history's only entry, the first that can be the best.

        Several processes have to call it together.
        """
        if self.rank_is_final:
            self.best = self.selection_score(self.history[0])
            self.start = copy.deepcopy(self.checkpoint())

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.allocator:
            self.allocator.load_state_dict(state["allocator"])
        for name in PROGRESS:
            setattr(self, name, state["progress"][name])
        self.fresh = False
        self.sums = self.sums.to(self.model.shifts.device)
        rng = [state["rng"], *state["other_rng"]]
        if processes.rank() < len(rng):
            set_rng_state(rng[processes.rank()])
        else:
            seed_process(self.args.seed, self.step)

    @property
    def rank_is_final(self) -> bool:
        return self.allocator is None or self.allocator.is_final(self.step)


def seed_process(seed: int, step: int) -> None:
    """Give each process beside the main one a random stream of its own, for dropout."""
    key = np.random.SeedSequence([seed, processes.rank(), step]).generate_state(2, np.uint64)
    torch.manual_seed(int(key[0]) >> 1)


def build_run(
    args: argparse.Namespace, dataset: RealQwenVLDataset, device: torch.device
) -> TrainState:
    """Build model, optimiser, scheduler and allocator of a run that has not begun."""
    torch.manual_seed(args.seed)
    config = ModelConfig(
        arch=args.arch,
        input_dim=dataset.feature_dim,
        num_tokens=dataset.num_tokens,
        grid=dataset.grid,
        rank=args.rank,
        factors=args.factors,
        refine_steps=args.refine_steps,
        oversample=args.oversample,
        lambda_B=args.lambda_B,
        hidden_dim=args.hidden_dim,
        num_blocks=args.num_blocks,
        dropout=args.dropout,
        precision=args.precision,
    )
    model = core = build_model(config)
    head = None
    if args.task_head or args.metric:
        model, head = in_learned_norm(core, args, dataset, device)
    model = model.to(device)
    optimizer = build_optimizer(model, core, args)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=plateau_patience(args.patience)
    )
    allocator = None
    if args.use_rank_allocator:
        allocator = RankAllocator(
            model,
            init_warmup=args.allocator_init_warmup,
            final_warmup=args.allocator_final_warmup,
            mask_interval=args.allocator_mask_interval,
            keep_ratio=args.allocator_keep_ratio,
            importance=args.allocator_importance,
        )
    if not processes.is_main():  # from here on: all have begun with the same weights
        seed_process(args.seed, step=0)
    sums = torch.zeros(len(TERMS), dtype=torch.float64, device=device)
    return TrainState(
        args,
        model,
        optimizer,
        scheduler,
        allocator,
        cache_identity(dataset),
        args.epochs,
        sums=sums,
        head=head,
        images=fitted_images(dataset),
    )


def build_optimizer(
    model: LowRankFactorModel, core: LowRankFactorModel, args: argparse.Namespace
) -> torch.optim.AdamW:
    """Build AdamW over three groups: with weight decay, without, and those that move by factors.

    core: the model itself, or the one that a learned norm stands around.
    """
    # what all images share of the learned norm moves by factors, as a shift does
    quick = [core.shift_logits, *(model.weighting.shared() if args.task_head else [])]
    quick_ids = {id(p) for p in quick}
    named = [(n, p) for n, p in model.named_parameters() if id(p) not in quick_ids]
    # no decay for biases, norms and the gate: zero is no better a place for them
    gate = ("lora_E", "core.lora_E")
    undecayed = [p for n, p in named if p.ndim < 2 or n in gate]
    decayed = [p for n, p in named if p.ndim >= 2 and n not in gate]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
        {"params": quick, "weight_decay": 0.0, "lr": args.lr * SHIFT_LR_FACTOR},
    ]
    # fused: one kernel a step, and it skips a step by a flag on the device (see train_step)
    return torch.optim.AdamW(groups, lr=args.lr, fused=True)


def plateau_patience(patience: int) -> int:
    """Return the epochs without progress after which the rate is halved."""
    return max(1, patience // 2 - 1)


def in_learned_norm(
    core: LowRankFactorModel,
    args: argparse.Namespace,
    dataset: RealQwenVLDataset,
    device: torch.device,
) -> tuple[TaskFactorModel, TaskHead | None]:
    """Put `core` in the norm of --metric, or in the plain one, for --task_head to train on.

    Without a head the metric stays as it is.
    """
    if args.use_rank_allocator:
        flag = "task_head" if args.task_head else "metric"
        raise InputError(f"--{flag} keeps every rank: omit --use_rank_allocator")
    metric = load_metric(args.metric, dataset) if args.metric else None
    head = None
    if args.task_head:
        from heads.load_head import load_head

        head = load_head(
            args.task_head, dataset, device=device, model=args.head_model, flag="--task_head"
        )
    if metric is None:  # the plain norm, whose untrained network is the plain SVD
        task = {"head": head.name, "head_sha256": head.sha256, "metric_sha256": None}
        return TaskFactorModel(core, task), head
    if head:
        check_head(metric, head)
    task = {key: metric.info[key] for key in ("head", "head_sha256")}
    model = TaskFactorModel(core, task | {"metric_sha256": metric.sha256})
    model.weighting.start_from(metric)
    model.weighting.requires_grad_(head is not None)
    return model, head


def open_run(args: argparse.Namespace, folder: Path, dataset: RealQwenVLDataset) -> TrainState:
    """Return a new run, or the one that --resume names.

    Raises InputError where flags, the cache's images, metric or head contradict the run that is
    resumed.
    """
    device = arguments.pick_device(args.device)
    if not args.resume:
        return build_run(args, dataset, device)
    path = folder / f"{args.resume}_model.pt"
    state = load_checkpoint(path, dataset)
    check_same_images(path, state, dataset)
    # the model's own values where a flag was left to its default
    before = state["args"] | state["config"]
    for name in sorted(args.typed - FREE_ON_RESUME):
        if vars(args)[name] != before[name]:
            raise InputError(
                f"--{name} {vars(args)[name]} differs from the {before[name]} that {path} was "
                f"trained with: omit --{name} to go on, or --resume to start anew"
            )
    check_finished(args, path, state)
    kept = {k: v for k, v in state["args"].items() if k not in FREE_ON_RESUME}
    typed_size = args.batch_size if "batch_size" in args.typed else None
    kept["batch_size"], note = batch_size_on_resume(state, path, typed_size)
    untyped = {"lr", "patience"} | ({"epochs"} if args.resume == "last" else set())
    kept |= {name: before[name] for name in untyped - args.typed}
    args = argparse.Namespace(**{**vars(args), **kept})
    run = build_run(args, dataset, device)
    if different := first_difference(state["norm"] or {}, run.model.norm or {}):
        key, before, now = different
        raise InputError(
            f"{path} was trained with {key} {before}, and what is there now has {now}: put the "
            "metric or head back that it was trained with, or train anew"
        )
    run.restore(state)
    # counted in steps of the batch size of now
    images_done = run.batches_done * images_a_step(state)
    run.batches_done = images_done // (args.batch_size * processes.world())
    run.note = note
    if args.resume == "best" or ("epochs" in args.typed and run.finished):  # epochs are added
        run.last_epoch = run.epoch - 1 + args.epochs
        run.finished = False
        stopped_early = run.bad_epochs >= run.args.patience
        if args.resume == "best" or stopped_early:  # counts anew
            run.bad_epochs = 0
    if args.resume == "best":
        run.cuts_history = _differs(folder / "history.json", run.history)
    if "patience" in args.typed:
        run.scheduler.patience = plateau_patience(args.patience)
    if "lr" in args.typed:
        for group, factor in zip(run.optimizer.param_groups, (1, 1, SHIFT_LR_FACTOR), strict=True):
            group["lr"] = args.lr * factor
    return run


def check_same_images(path: Path, state: dict, dataset: RealQwenVLDataset) -> None:
    """Raise InputError where the cache holds other images than the run was trained on.

    Groups may have kept their names, and with them the split, when images were replaced; and what
    a run has seen is left out of its test numbers.
    """
    known, here = set(state["images"]["image_sha256"]), set(fitted_images(dataset)["image_sha256"])
    if known != here:
        raise InputError(
            f"{path} was trained on other images: {len(known - here)} of its {len(known)} are not "
            f"among the training and validation images of {dataset.cache_dir}, and "
            f"{len(here - known)} there are new: name the cache it was trained on, or train anew"
        )


def check_finished(args: argparse.Namespace, path: Path, state: dict) -> None:
    """Raise InputError where --resume last and --epochs do not fit together.

    A finished run needs epochs to add, unless it was cut off before its test and figures; an
    unfinished one goes on to its own end.
    """
    if args.resume != "last":
        return
    progress, begun_with = state["progress"], state["args"]["epochs"]
    if not progress["finished"]:
        if "epochs" in args.typed and args.epochs != begun_with:
            raise InputError(
                f"--epochs {args.epochs}: {path} is of an unfinished run of {begun_with} epochs, "
                "to whose end --resume last goes on: omit --epochs"
            )
        return
    results = path.parent / "test_results.json"
    if "epochs" not in args.typed and results.exists():
        test = read_json(results, "remove it and type --resume last again")
        if test.get("epochs") == progress["epoch"] - 1:  # and not of an earlier run
            raise InputError(
                f"{path} is of a finished run: type --resume last --epochs N to add N epochs"
            )


def start_from_data(run: TrainState, dataset: RealQwenVLDataset) -> None:
    """Let a new model start from the training tokens: see `LowRankFactorModel.start_from`.

    The main process reads all processes' images; all of them have to call this and get the same.
    """
    model = run.model
    if model.config.factors == "projected" and run.args.selected_features == "even":
        return
    moment = None
    if processes.is_main():
        size, seed = run.args.batch_size, run.args.seed
        loader = BatchLoader(dataset, dataset.split.train, size, run.sums.device, seed)
        learned = isinstance(model, TaskFactorModel)  # its sketch is one of tokens in their norm
        moment = second_moment(
            model.in_norm(batch.x, batch.grid)[0].detach() if learned else batch.x
            for batch in loader.with_progress("second moment")
        ).cpu()
    model.start_from(processes.from_main(moment))


def batch_size_on_resume(state: dict, path: Path, typed: int | None) -> tuple[int, str]:
    """Return the images a step of each process, and a note of what that changes, or ""."""
    before, now = images_a_step(state), (typed or 0) * processes.world()
    if typed is None or now == before:
        return own_batch_size(state, path), ""
    done = state["progress"]["batches_done"] * before
    if done % now:
        raise InputError(
            f"--batch_size {typed}: the epoch that was cut off stands after {done} images, which "
            f"is no multiple of {now} a step: halve the {before} it was begun with, or omit "
            "--batch_size"
        )
    return typed, (
        f"--batch_size: {now} images a step instead of {before}, in the same order: results are "
        "no longer those of an unbroken run bit for bit"
    )


def images_a_step(state: dict) -> int:
    """Return the images a step of all processes together, as the checkpoint's run had them."""
    return state["args"]["batch_size"] * state["processes"]


def own_batch_size(state: dict, path: Path) -> int:
    """Return the images a step of each process: together as many as the run began with."""
    images = images_a_step(state)
    world = processes.world()
    if images % world:
        counts = ", ".join(str(n) for n in range(1, images + 1) if images % n == 0)
        raise InputError(
            f"{path} was trained with {images} images a step, which {world} processes cannot "
            f"share evenly: start one of {counts} processes"
        )
    return images // world


def _differs(path: Path, history: list[dict]) -> bool:
    """Return whether history.json holds something else than `history`, or is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) != history
    except FileNotFoundError:
        return False
    except ValueError:
        return True
