"""Train a network that factors vision tokens, X ≈ A·B, from a feature cache.

    python train_real_data.py --arch ResMLP --epochs 500 --lr 1e-4 --rank 128
    python train_real_data.py --arch ResMLP --epochs 3   # minutes on a CPU
    python train_real_data.py --arch ResMLP --resume --epochs 100
    torchrun --nproc_per_node 2 train_real_data.py --batch_size 4   # 8 a step

Writes results/<arch>/: best_model.pt, last_model.pt, history.json, test_results.json and four
figures; log/logs_<timestamp>/: config.json, training.log, final_summary.json. Goes on with --resume
(from the best model, --epochs more) or --resume last (exactly where an interrupted run was; a
finished one with --epochs to add).
Processes share every step's images, --batch_size each (gradients averaged over images, so the
losses are those of one process with all of them, up to rounding and to dropout's masks).
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from common import arguments, processes
from common.results import move_aside
from lowrank_tokens.errors import optimum, percent_text, summarise
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import LOCK_NAME, atomic_path, new_folder, sweep_temporaries, write_json
from model import ARCHITECTURES, canonical_arch
from qwenvl_dataloader import Batch, Loaders, RealQwenVLDataset, create_data_loaders_real
from svd_baseline import evaluate_batches
from training.checkpoint import save_checkpoint
from training.final_results import evaluate_best_model
from training.run_log import RunLog, epoch_line, print_header, report, task_words
from training.state import SHIFT_LR_FACTOR, TERMS, TrainState, open_run, start_from_data
from training.trained_norm import in_own_norm, task_record, task_terms

CLIP_NORM = 1.0
RESUME_FLAGS = ("results_dir", "cache_dir", "log_dir", "device", "tensorboard", "patience")
CHECK_EVERY = 50  # steps between looks at the non-finite flag, each a wait for the device


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)

    group = parser.add_argument_group("files and device")
    arguments.add_cache_dir(group)
    arguments.add_results_dir(group, help="results go to its <arch>/ folder")
    group.add_argument(
        "--log_dir",
        type=arguments.folder,
        default="log",
        metavar="DIR",
        help="logs go to its logs_<timestamp>/ folder",
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard events to the log as well"
    )
    arguments.add_device(group)
    add_model_arguments(parser)
    add_training_arguments(parser)
    add_task_arguments(parser)
    add_allocator_arguments(parser)
    return parser


# flags that do nothing without another one
NEEDED = {
    "lambda_task": "task_head",
    "allocator_init_warmup": "use_rank_allocator",
    "allocator_final_warmup": "use_rank_allocator",
    "allocator_mask_interval": "use_rank_allocator",
    "allocator_keep_ratio": "use_rank_allocator",
    "allocator_importance": "use_rank_allocator",
}


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError where one flag does nothing, or cannot be, beside the others."""
    if args.use_rank_allocator and args.arch != "AdaLoRA":
        raise InputError(f"--use_rank_allocator needs --arch AdaLoRA, not {args.arch}")
    if "selected_features" in args.typed and args.factors == "direct":
        raise InputError("--factors direct reads all features: omit --selected_features")
    if args.resume:  # `open_run` compares every flag with the run's own
        return
    arguments.check_head_model(args.head_model, args.task_head)
    for flag, needed in NEEDED.items():
        if flag in args.typed and not vars(args)[needed]:
            raise InputError(f"--{flag} does nothing without --{needed}: type both")


def loss_weights(args: argparse.Namespace) -> dict[str, float]:
    """Return the weight of each term of the loss; the other TERMS are only logged."""
    return {
        "reconstruction": 1.0,
        "B": args.lambda_B,
        "ortho": args.lambda_ortho,
        "lora_ortho": args.lambda_ortho,
        "act": args.lambda_act,
    } | ({"task": args.lambda_task} if args.task_head else {})


def train_step(run: TrainState, batch: Batch) -> tuple[Tensor, Tensor]:
    """Take one optimiser step of all processes, on this process's images of it.

    Returns the means of TERMS over the step's images [len(TERMS)] float64 and a scalar flag, 1
    where the step is not finite; then it changed no weight. On CUDA only the eigenproblem of the
    refinement waits for the device (`linalg.refine`), and a rank allocator where it sets a mask.
    """
    if run.head:
        terms = task_terms(run.model, run.head, batch, run.step)
    else:
        terms = run.model.loss_terms(batch.x, batch.singular_values, batch.grid)._asdict()
    energy = terms.pop("component_energy")
    loss = sum(weight * terms[name] for name, weight in loss_weights(run.args).items())
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    # means over the images of all processes, from each process's own
    absent = terms["mse"].new_zeros(())  # the task's, without a head
    means = torch.stack([terms.get(name, absent).detach().double() for name in TERMS])
    total = loss.detach().double()
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    processes.average_([*gradients, total, means, energy], batch.share)
    if run.allocator:
        run.allocator.observe(run.model, energy)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP_NORM)
    broken = (~(norm.isfinite() & total.isfinite())).float()
    # the flag that a GradScaler sets: a fused AdamW reads it on the device, and where it is 1 it
    # leaves weights, moments and its count of steps as they are
    run.optimizer.found_inf = broken
    run.optimizer.step()
    run.step += 1
    if run.allocator:
        run.allocator.apply(run.model, run.step)
    return means, broken


def train(
    run: TrainState, loaders: Loaders, folder: Path, log: RunLog, stop: processes.Stop
) -> None:
    """Train to `run.last_epoch`, to early stopping, or to a signal; writes the checkpoints."""
    broken = torch.zeros((), device=run.sums.device)
    while run.epoch <= run.last_epoch and run.bad_epochs < run.args.patience:
        # steps of one epoch, from where it was interrupted
        begun, first_batch = time.perf_counter(), run.batches_done
        run.model.train()
        loaders.train.set_epoch(run.epoch, start=run.batches_done)
        label = f"epoch {run.epoch}/{run.last_epoch}"
        for batch in loaders.train.with_progress(label, show=processes.is_main()):
            means, bad = train_step(run, batch)
            run.sums += means * batch.images
            run.batches_done += 1
            broken += bad
            if run.step % CHECK_EVERY == 0:
                check_finite(broken, folder)
            if stop.requested():
                check_finite(broken, folder)
                save(run, folder / "last_model.pt", log)
                return
        check_finite(broken, folder)

        # validation; plateau, best and stopping wait for the final rank
        seconds = time.perf_counter() - begun
        record = close_epoch(run, loaders, seconds, run.batches_done - first_batch)
        record = processes.from_main(record)  # all decide by it: it must not differ in a last bit
        score = run.selection_score(record)
        if not math.isfinite(score):
            raise InputError(f"validation is not finite in epoch {run.epoch}: lower --lr")
        run.history.append(record)
        run.epoch, run.batches_done = run.epoch + 1, 0
        run.sums.zero_()
        improved = run.rank_is_final and score < run.best
        if run.rank_is_final:
            run.scheduler.step(score)
            run.bad_epochs = 0 if improved else run.bad_epochs + 1
        if improved:
            run.best, run.best_epoch = score, record["epoch"]
        run.finished = run.epoch > run.last_epoch or run.bad_epochs >= run.args.patience

        # files, then one line for people
        if improved:
            save(run, folder / "best_model.pt", log)
        save(run, folder / "last_model.pt", log)
        if processes.is_main():
            write_json(folder / "history.json", run.history)
        log(epoch_line(record, run))
        log.board(record)


def check_finite(broken: Tensor, folder: Path) -> None:
    """Raise InputError where any step so far had a non-finite loss or gradient."""
    if steps := int(broken.item()):
        good = [n for n in ("best_model.pt", "last_model.pt") if (folder / n).exists()]
        kept = f"{folder / good[0]} is kept" if good else "no checkpoint was written yet"
        raise InputError(
            f"the loss was not finite in {steps} step(s), which were skipped ({kept}): lower --lr, "
            "or look for bad features with extract_features.py --verify"
        )


def validate(run: TrainState, loaders: Loaders) -> dict:
    """Return the validation part of a history entry: whole-matrix errors of A·B itself.

    They are taken in the norm that the model trains in; a learned norm has the excess in the
    Frobenius norm too. Each process evaluates its part of the images, and all get the whole entry.
    """
    model = run.model.eval()
    rank = model.current_effective_rank()
    batches = loaders.val.with_progress("validation", show=processes.is_main())
    core, batches = in_own_norm(model, batches)
    spectra: dict[str, list[Tensor]] = {"mean_square": [], "optimum": []}

    def with_spectra_kept() -> Iterator[Batch]:
        for batch in batches:
            sigma = batch.singular_values.cpu()
            spectra["mean_square"].append(sigma.square().sum(-1) / batch.x[0].numel())
            spectra["optimum"].append(optimum(sigma, rank))
            yield batch

    own = evaluate_batches(lambda batch: core(batch.x, grid=batch.grid), with_spectra_kept(), rank)
    own |= {name: torch.cat(parts) for name, parts in spectra.items() if own}
    metrics = processes.gather_columns(own)
    mean_square = metrics["mean_square"]
    mean_square = torch.where(mean_square > 0, mean_square, 1)  # for an X of zeros
    record = {
        "val_mse": float((metrics["rel_error"].square() * mean_square).mean()),
        "val_optimum_mse": float((metrics["optimum"].square() * mean_square).mean()),
        "val_rel_error": float(metrics["rel_error"].mean()),
        "val_excess_pct": summarise(metrics["excess_pct"])["mean"],
        "effective_rank": rank,
    }
    if model.norm:
        plain = evaluate_batches(lambda batch: model(batch.x, grid=batch.grid), loaders.val, rank)
        plain = processes.gather_columns(plain)
        record["val_frobenius_excess_pct"] = summarise(plain["excess_pct"])["mean"]
    return record | (task_record(model, run.head, loaders.val) if run.head else {})


def close_epoch(run: TrainState, loaders: Loaders, seconds: float, batches: int) -> dict:
    """Return the history entry of the epoch whose last step is done."""
    images = loaders.train.num_images
    mean = dict(zip(TERMS, (run.sums / images).tolist(), strict=True))
    weighted = {f"loss_{name}": w * mean[name] for name, w in loss_weights(run.args).items()}
    done = min(images, batches * run.args.batch_size * processes.world())
    return {
        "epoch": run.epoch,
        "step": run.step,
        "train_loss": sum(weighted.values()),
        "train_mse": mean["mse"],
        "train_optimum_mse": mean["optimum_mse"],
        **validate(run, loaders),
        **weighted,
        "shifts": run.model.shifts.tolist(),
        **kept_components(run),
        "lr": run.optimizer.param_groups[0]["lr"],
        "seconds": round(seconds, 3),
        "samples_per_s": round(done / seconds, 2),
    }


def kept_components(run: TrainState) -> dict[str, list[int]]:
    """Return the history's entry of the allocator's mask; {} without an allocator."""
    if not run.allocator:
        return {}
    mask = run.model.effective_rank_mask().flatten()
    return {"kept_components": mask.nonzero().flatten().tolist()}


def save(run: TrainState, path: Path, log: Callable[[str], None]) -> None:
    """Write a checkpoint; a fresh run's first one moves the results of an earlier run aside.

    test_results.json marks a run as complete (`evaluate_best_model` writes it last), so a run that
    goes on takes it away.
    """
    state = run.checkpoint()
    if processes.is_main():
        if run.fresh:
            set_aside(path.parent, log)
        if run.cuts_history:
            keep_copy(path.parent, run, log)
        if run.start:  # the best so far, until training has found a better one
            save_checkpoint(path.parent / "best_model.pt", run.start)
        (path.parent / "test_results.json").unlink(missing_ok=True)
        save_checkpoint(path, state)
    run.fresh, run.start, run.cuts_history = False, None, False


def set_aside(folder: Path, log: Callable[[str], None]) -> None:
    """Move an earlier run's results to previous-<time>/ before a fresh run writes its own."""
    old = [p for p in folder.iterdir() if not p.name.startswith(("previous-", LOCK_NAME))]
    # killed half-way, what is left must not look like a run that --resume last goes on with
    old.sort(key=lambda path: path.name != "last_model.pt")
    if old:
        log(f"results of an earlier run were moved to {move_aside(old, folder)}")


def keep_copy(folder: Path, run: TrainState, log: Callable[[str], None]) -> None:
    """Copy what holds the epochs that a resumed run leaves behind to previous-<time>/."""
    names = ("history.json", "test_results.json", "last_model.pt")
    found = [folder / name for name in names if (folder / name).exists()]
    target = new_folder(folder / time.strftime("previous-%Y%m%d-%H%M%S"))
    for path in found:
        with atomic_path(target / path.name) as temporary:
            shutil.copyfile(path, temporary)
    log(f"the history after epoch {run.best_epoch} is kept in {target}")


def begin(run: TrainState, dataset: RealQwenVLDataset, loaders: Loaders, log: RunLog) -> None:
    """Start a new model from the training tokens, and enter it as epoch 0."""
    start_from_data(run, dataset)
    initial = processes.from_main(validate(run, loaders))
    run.history.append({"epoch": 0, **initial})
    run.keep_start()
    log(
        f"untrained   val_mse {initial['val_mse']:.6e}  optimum "
        f"{initial['val_optimum_mse']:.6e}  excess "
        + percent_text(initial["val_excess_pct"])
        + (f"  {task_words(initial)}" if run.head else "")
    )


def log_resumed(run: TrainState, log: RunLog) -> None:
    """Log where a resumed run goes on, and what else one could type."""
    args, lr = run.args, run.optimizer.param_groups[0]["lr"]
    trained_for = f" trained for --task_head {args.task_head}" if args.task_head else ""
    of = f"epoch {run.epoch} of {run.last_epoch}, lr {lr:.3e}"
    log(f"going on with the run{trained_for}: {of}; without --resume a new run begins")
    if run.note:
        log(run.note)
    if args.resume == "best" and run.best_epoch == 0:
        log(
            "epoch 0 is the best: training has not helped so far, and starts again from the "
            f"untrained network; type --resume last --epochs {args.epochs} to go on from the last "
            "epoch instead, or --lr to train otherwise"
        )
    elif args.resume == "best":
        later = "later ones, if there were any, are left behind and come out the same again"
        log(f"epoch {run.epoch - 1} is the best: {later}; type --lr to train otherwise")


def main(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    args.arch = canonical_arch(args.arch)
    check_flags(args)
    folder = Path(args.results_dir) / args.arch
    dataset = RealQwenVLDataset(args.cache_dir)
    run = open_run(args, folder, dataset)
    args = run.args
    processes.check_same("has another cache or checkpoint", (run.identity, run.step))
    loaders = create_data_loaders_real(
        dataset,
        args.batch_size,
        seed=args.seed,
        device=run.sums.device,
        part=(processes.rank(), processes.world()),
        tenants=processes.local_world(),
    )
    if run.allocator:
        steps = len(loaders.train)
        run.allocator.check_fits(run.step + (run.last_epoch - run.epoch + 1) * steps, steps)
    with processes.sole_writer(folder, "--results_dir"), RunLog(args) as log:
        if processes.is_main():
            sweep_temporaries(folder)
        print_header(run, dataset, loaders, log)
        if args.resume:
            log_resumed(run, log)
        else:
            begin(run, dataset, loaders, log)
        with processes.Stop() as stop:
            train(run, loaders, folder, log, stop)
        if stop.signal and not run.finished:
            again = arguments.flags_again(args, *RESUME_FLAGS)
            log(
                f"stopped by signal {stop.signal} in epoch {run.epoch}: wrote last_model.pt; "
                f"go on with python train_real_data.py --arch {args.arch} --resume last{again}"
            )
            return 128 + stop.signal
        if processes.is_main():
            results = evaluate_best_model(folder, dataset, loaders, run.history, run.head)
            report(run, results, folder, log, time.perf_counter() - started)
    return 0


# -------------------------------------------------------------------------- arguments by group


def add_model_arguments(parser: arguments.Parser) -> None:
    """Add the architecture, its size and its precision."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--arch",
        type=arguments.name,
        default="ResMLP",
        help=f"architecture: {', '.join(ARCHITECTURES)}, or an alias of one",
    )
    group.add_argument(
        "--rank",
        type=arguments.positive_int,
        default=128,
        metavar="N",
        help="r, columns of A: a higher rank has a smaller error and stores r (T + D) numbers",
    )
    group.add_argument(
        "--factors",
        choices=("projected", "direct"),
        default="projected",
        help="projected: the branches propose a subspace and X is projected on it. direct: the "
        "branches predict A and B, beside a basis shared by all images",
    )
    group.add_argument(
        "--refine_steps",
        type=arguments.small_int,
        metavar="N",
        help="K, refinement steps of projected factors (default 1): more are nearer to the SVD and "
        "slower",
    )
    group.add_argument(
        "--oversample",
        type=arguments.non_negative_int,
        metavar="N",
        help="p, extra sketch columns of projected factors (default 32): more are nearer to the "
        "SVD and slower",
    )
    group.add_argument(
        "--selected_features",
        choices=("pivoted", "even"),
        default="pivoted",
        help="which 256 features the branches of projected factors read: chosen from the training "
        "tokens by pivoted Cholesky, or evenly spaced",
    )
    group.add_argument(
        "--hidden_dim",
        type=arguments.layer_width,
        default=256,
        metavar="N",
        help="width of the branches' hidden layers",
    )
    group.add_argument(
        "--num_blocks",
        type=arguments.small_int,
        metavar="N",
        help="residual blocks (default 1) or hidden layers (default 2) of a branch",
    )
    group.add_argument(
        "--dropout",
        type=arguments.Number(float, 0, below=1),
        default=0.0,
        metavar="X",
        help="share of hidden units that a training step leaves out: more overfits less",
    )
    group.add_argument(
        "--precision",
        choices=("float32", "bf16"),
        default="float32",
        help="of the branches; the linear algebra is float64",
    )


def add_training_arguments(parser: arguments.Parser) -> None:
    """Add length, rate and weights of the loss."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs",
        type=arguments.positive_int,
        default=20,
        metavar="N",
        help="passes over the training images; with --resume as many more",
    )
    group.add_argument(
        "--batch_size",
        type=arguments.batch_size,
        default=8,
        metavar="N",
        help="images a step of each process",
    )
    group.add_argument(
        "--lr",
        type=arguments.positive_float,
        default=1e-4,
        metavar="X",
        help=f"AdamW's learning rate; shifts get {SHIFT_LR_FACTOR} times it",
    )
    group.add_argument(
        "--weight_decay",
        type=arguments.loss_weight,
        default=1e-5,
        metavar="X",
        help="AdamW's weight decay",
    )
    group.add_argument(
        "--patience",
        type=arguments.positive_int,
        default=10,
        metavar="N",
        help="epochs without a better validation before the run stops; better is a smaller mse "
        "above its optimum, with --task_head a smaller loss of the head",
    )
    group.add_argument(
        "--lambda_B",
        type=arguments.loss_weight,
        default=1e-4,
        metavar="X",
        help="ridge of B, and weight of ‖B‖²/(TD) in the loss",
    )
    group.add_argument(
        "--lambda_ortho",
        type=arguments.loss_weight,
        default=1e-3,
        metavar="X",
        help="weight of the orthogonality penalties on the sketch and on SVDLinear",
    )
    group.add_argument(
        "--lambda_act",
        type=arguments.loss_weight,
        default=0.0,
        metavar="X",
        help="weight of the orthogonality penalty on row_net's output",
    )
    group.add_argument(
        "--seed",
        type=arguments.random_seed,
        default=42,
        metavar="N",
        help="seed of weights, order and dropout; the split has its own",
    )
    group.add_argument(
        "--resume",
        choices=("best", "last"),
        nargs="?",
        const="best",
        help="best (or no word): go on from best_model.pt for --epochs more. last: go on exactly "
        "where last_model.pt was; a finished run needs --epochs to add",
    )


def add_task_arguments(parser: arguments.Parser) -> None:
    """Add a head that the network is trained for."""
    group = parser.add_argument_group("training for a task")
    group.add_argument(
        "--task_head",
        type=arguments.name,
        metavar="NAME",
        help="saliency or qwen-answer: the head's error joins the loss, and the norm that X is "
        "factored in is learned",
    )
    group.add_argument(
        "--lambda_task",
        type=arguments.positive_float,
        default=1.0,
        metavar="X",
        help="weight of the mean log task error at the ranks 4 to 32",
    )
    group.add_argument(
        "--metric",
        type=arguments.file,
        metavar="FILE",
        help="metric of experiments.estimate_metric to factor X in; with --task_head the learned "
        "norm starts from it, which else starts from the Frobenius norm",
    )
    arguments.add_head_model(group)


def add_allocator_arguments(parser: arguments.Parser) -> None:
    """Add the schedule that lowers the rank."""
    group = parser.add_argument_group("rank allocator (AdaLoRA)")
    group.add_argument(
        "--use_rank_allocator", action="store_true", help="lower the rank while training"
    )
    group.add_argument(
        "--allocator_init_warmup",
        type=arguments.non_negative_int,
        default=1000,
        metavar="N",
        help="optimiser steps at the full rank",
    )
    group.add_argument(
        "--allocator_final_warmup",
        type=arguments.positive_int,
        default=1000,
        metavar="N",
        help="optimiser steps after those during which the rank falls",
    )
    group.add_argument(
        "--allocator_mask_interval",
        type=arguments.positive_int,
        default=20,
        metavar="N",
        help="optimiser steps between two masks",
    )
    group.add_argument(
        "--allocator_keep_ratio",
        type=arguments.Number(float, above=0, at_most=1),
        default=0.25,
        metavar="X",
        help="final rank as a fraction of --rank",
    )
    group.add_argument(
        "--allocator_importance",
        choices=("energy", "sensitivity"),
        default="energy",
        help="which component goes first: the one with least energy, or (direct factors) the one "
        "that AdaLoRA's sensitivity rates least",
    )


if __name__ == "__main__":
    processes.run(main, get_args_parser())
