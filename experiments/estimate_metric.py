"""Estimate the metric of a task: which features of the tokens a head's output depends on.

    python -m experiments.estimate_metric --head saliency --probes 3
    python -m experiments.estimate_metric --head qwen-answer

Writes metrics/<head>.safetensors, for --metric of the other scripts (format: heads/metric.py). The
gradients are those of training images; the shrinkage is the one with the least task error on
validation images. Test images are not looked at. The file stores the hashes and groups of its
images, which judges leave out of their test images. Work is saved every minute to <out>.partial:
after a cut the same command goes on from it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common import arguments
from heads.load_head import HEADS, load_head
from heads.metric import (
    CONTENT_HASH,
    MomentSum,
    TaskMetric,
    cache_hashes,
    content_sha256,
    save_metric,
    shrunk,
)
from heads.task_error import closed_form, cut_at_ranks, task_errors
from heads.task_head import TaskHead
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import check_same_header, save_tensors
from lowrank_tokens.linalg import exact_factors
from qwenvl_dataloader import BatchLoader, RealQwenVLDataset, create_data_loaders_real
from training.unseen import images_of

JUDGED_AT = (8, 32)  # ranks at which a shrinkage is judged
SAVE_EVERY = 60  # seconds between writes of the sums so far, D² float64 each


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("head and estimate")
    group.add_argument("--head", choices=HEADS, default="saliency", help="head whose output counts")
    arguments.add_head_model(group)
    group.add_argument(
        "--probes",
        type=arguments.positive_int,
        default=3,
        metavar="N",
        help="random projections of the head's output for each image: more give a steadier "
        "estimate and take as many times longer",
    )
    group.add_argument(
        "--images",
        type=arguments.positive_int,
        metavar="N",
        help="use at most so many training images, and as many validation images, drawn by --seed "
        "(default: all): fewer are faster and give a noisier estimate",
    )
    group.add_argument(
        "--shrinkage",
        type=arguments.positive_float,
        nargs="+",
        default=[1e-3, 1e-2, 1e-1],
        metavar="X",
        help="shares of the mean diagonal that are added to it; validation images choose one",
    )
    group.add_argument(
        "--seed",
        type=arguments.random_seed,
        default=42,
        metavar="N",
        help="of the probes and of the choice of --images",
    )
    group = parser.add_argument_group("files and device")
    group.add_argument(
        "--out",
        type=arguments.file,
        metavar="FILE",
        help="file to write (default: metrics/<head>.safetensors)",
    )
    arguments.add_cache_dir(group)
    arguments.add_batch_size(group)
    arguments.add_device(group)
    return parser


def main(args: argparse.Namespace) -> None:
    arguments.check_head_model(args.head_model, args.head)
    path = Path(args.out or Path("metrics") / f"{args.head}.safetensors")
    if path.is_dir() or any(p.is_file() for p in path.parents):
        raise InputError(f"--out {path} cannot be a file there: name another")
    device = arguments.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    head = load_head(args.head, dataset, device=device, model=args.head_model)
    train, val = loaders_of(dataset, args, device)
    probes = f"{args.probes} probes of {train.num_images} training images"
    print(f"{dataset.label}; head {head.name}, {probes}")
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "head": head.name,
        "head_sha256": head.sha256,
        "cache": cache_hashes(dataset),
        "probes": args.probes,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "images": train.num_images,
        "validation_images": val.num_images,
    }
    work = PartialWork.open(path.with_name(f"{path.name}.partial"), header)
    sum_gradients(head, train, work, args)
    moment = work.sum.mean(head)

    tried = {
        amount: work.errors(f"shrinkage {amount:g}", head, val, shrunk(moment, amount))
        for amount in args.shrinkage
    }
    plain = work.errors("plain SVD", head, val, None)
    best = min(tried, key=lambda a: sum(e / p for e, p in zip(tried[a], plain, strict=True)))
    print_tried(tried, plain, best)

    info = {key: header[key] for key in ("head", "head_sha256", "cache")} | {
        "data": dataset.label,
        "images": work.sum.images,
        "probes": args.probes,
        "seed": args.seed,
        "shrinkage": best,
        "scale": float(moment.diagonal().mean() * (1 + best)),
        "validation": {str(a): errors for a, errors in tried.items()},
        "seen": images_of(dataset, torch.cat([train.sampler.rows, val.sampler.rows])),
    }
    save_metric(path, TaskMetric(shrunk(moment, best), info))
    work.path.unlink(missing_ok=True)
    again = arguments.flags_again(args, "head_model", "cache_dir", "device")
    print(
        f"wrote {path}; next, for a network that is trained: "
        f"python compare_svd_nn.py --head {head.name} --metric {path}{again}"
    )


def loaders_of(
    dataset: RealQwenVLDataset, args: argparse.Namespace, device: torch.device
) -> tuple[BatchLoader, BatchLoader]:
    """Return loaders of training and validation images, at most --images each."""
    loaders = create_data_loaders_real(dataset, args.batch_size, seed=args.seed, device=device)
    if args.images is None:
        return loaders.train, loaders.val
    chosen = []
    for rows in (dataset.split.train, dataset.split.val):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
        chosen.append(rows[order[: args.images].sort().values])
    return loaders.train.only(chosen[0]), loaders.val.only(chosen[1])


def sum_gradients(
    head: TaskHead, train: BatchLoader, work: PartialWork, args: argparse.Namespace
) -> None:
    """Add the gradients of the images that `work` lacks, and save it every minute."""
    if work.sum.images:
        print(f"going on after {work.sum.images} images that {work.path} already holds")
    # batches that are done: of a ragged cache not all are full
    done = accumulate(share.images for share in train.sampler.shares())
    train.set_epoch(0, start=sum(images <= work.sum.images for images in done))
    for batch in train.with_progress("gradients"):
        work.sum.add(head, batch, args.probes, args.seed)
        if time.monotonic() - work.saved > SAVE_EVERY:
            work.save()
    work.save()


def print_tried(tried: dict[float, list[float]], plain: list[float], best: float) -> None:
    print("task error on validation images at rank " + " and ".join(map(str, JUDGED_AT)))
    print("  SVD               " + "  ".join(f"{e:.5f}" for e in plain))
    for amount, errors in tried.items():
        chosen = "  chosen" if amount == best else ""
        print(f"  shrinkage {amount:<8g}" + "  ".join(f"{e:.5f}" for e in errors) + chosen)


@dataclass
class PartialWork:
    """Finished part of an estimate, in a file beside --out that goes when the metric is written.

    header: settings that the sums depend on; validation: label → task errors so far. Batches are
    summed in one order: an estimate that was cut off ends in the same bits.
    """

    path: Path
    header: dict
    sum: MomentSum = field(default_factory=MomentSum)
    validation: dict[str, list[float]] = field(default_factory=dict)
    saved: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, path: Path, header: dict) -> PartialWork:
        """Read the work at `path`, or begin. InputError where damaged or of other settings."""
        work, remedy = cls(path, header), f"remove {path} to begin anew"
        if not path.exists():
            return work
        try:
            with safe_open(path, framework="pt") as file:
                said, total = file.metadata() or {}, file.get_tensor("total")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged ({error}): {remedy}") from None
        if said.get(CONTENT_HASH) != content_sha256(total, said):
            raise InputError(f"{path} is damaged (its content hash is another): {remedy}")
        check_same_header(str(path), json.loads(said["header"]), header, remedy)
        images, tokens = json.loads(said["done"])
        work.sum, work.validation = MomentSum(total, images, tokens), json.loads(said["validation"])
        return work

    def save(self) -> None:
        total = self.sum.total.cpu()
        done = [self.sum.images, self.sum.tokens]
        said = {"header": self.header, "done": done, "validation": self.validation}
        said = {key: json.dumps(value) for key, value in said.items()}
        save_tensors(
            self.path, {"total": total}, said | {CONTENT_HASH: content_sha256(total, said)}
        )
        self.saved = time.monotonic()

    def errors(
        self, label: str, head: TaskHead, val: BatchLoader, matrix: Tensor | None
    ) -> list[float]:
        """Return `validation_errors` in the metric of `matrix`; each is computed once."""
        if label not in self.validation:
            metric = None if matrix is None else TaskMetric(matrix, {})
            self.validation[label] = validation_errors(head, val, metric, label)
            self.save()
        return self.validation[label]


def validation_errors(
    head: TaskHead, loader: BatchLoader, metric: TaskMetric | None, label: str
) -> list[float]:
    """Return the mean task error at JUDGED_AT of the metric's SVD; of the plain one for None."""
    plain = cut_at_ranks(lambda batch, rank: exact_factors(batch.x, rank))
    methods = {"svd": closed_form(metric) if metric else plain}
    ranks = [min(r, loader.dataset.num_tokens, loader.dataset.feature_dim) for r in JUDGED_AT]
    batches = loader.with_progress(f"{label}, validation")
    errors = task_errors(methods, head, batches, ranks)
    return [float(errors[rank]["svd"].mean()) for rank in ranks]


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
