"""Estimate the metric of a task: which features of the tokens a head's output depends on.

    python -m experiments.estimate_metric --head saliency
    python -m experiments.estimate_metric --head qwen-answer
Writes metrics/<head>.safetensors, for --metric of the other scripts (format: task_metric.py). The
gradients are those of training images; the shrinkage is the one with the least task error on
validation images. Test images are not looked at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from common import cli
from common.errors import UserError
from qwenvl_dataloader import BatchLoader, RealQwenVLDataset, create_data_loaders_real, denormalise
from svd_baseline import gram_eigh
from task.heads import TaskHead
from task.load_head import HEADS, load_head
from task.metric import TaskMetric, cache_hashes, metric_svd, save_metric, second_moment, shrunk

JUDGED_AT = (8, 32)  # ranks at which a shrinkage is judged


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Estimate which features of the tokens a head's output depends on.",
        epilog="example:\n  python -m experiments.estimate_metric --head saliency --probes 3",
    )
    task = parser.add_argument_group("head, metric and what is measured")
    task.add_argument("--head", choices=HEADS, default="saliency", help="whose output counts")
    task.add_argument("--head_model", type=cli.name, default=None, metavar="NAME",
                        help="of qwen-answer: folder or hub id of the whole checkpoint; default "
                             "the cache's encoder")  # fmt: skip
    task.add_argument("--probes", type=cli.number(int, 1), default=3,
                        help="random projections an image: noise of M against time")  # fmt: skip
    task.add_argument("--shrinkage", type=cli.number(float, above=0), nargs="+",
                        default=[1e-3, 1e-2, 1e-1], metavar="S",
                        help="of the mean diagonal, to try on validation images")  # fmt: skip
    task.add_argument(
        "--out", type=cli.name, default=None, help="file; default metrics/<head>.safetensors"
    )
    task.add_argument(
        "--cache_dir", type=cli.folder, default="feature_cache_real", help="feature cache to read"
    )
    task.add_argument("--batch_size", type=cli.number(int, 1), default=8, help="images at once")
    task.add_argument("--seed", type=cli.number(int, 0, 2**63 - 1), default=42, help="of probes")
    task.add_argument("--device", type=cli.name, default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(args: argparse.Namespace) -> None:
    cli.check_head_model(args.head_model, args.head)
    path = Path(args.out or Path("metrics") / f"{args.head}.safetensors")
    if path.is_dir() or any(p.is_file() for p in path.parents):
        raise UserError(f"--out {path} cannot be a file there: name another")
    device = cli.pick_device(args.device)
    dataset = RealQwenVLDataset(args.cache_dir)
    head = load_head(args.head, dataset, device=device, model=args.head_model)
    loaders = create_data_loaders_real(dataset, args.batch_size, device=device)
    print(f"{dataset.label}; head {head.name}, {args.probes} probes of "
          f"{loaders.train.num_images} training images")  # fmt: skip
    batches = loaders.train.with_progress("gradients")
    moment, images = second_moment(head, batches, args.probes, args.seed)

    tried = {}
    for amount in args.shrinkage:
        metric = TaskMetric(shrunk(moment, amount), {})
        tried[amount] = validation_errors(head, loaders.val, metric, f"shrinkage {amount:g}")
    plain = validation_errors(head, loaders.val, None, "plain SVD")
    best = min(tried, key=lambda a: sum(e / p for e, p in zip(tried[a], plain, strict=True)))
    print("task error on validation images at rank " + " and ".join(map(str, JUDGED_AT)))
    print("  SVD               " + "  ".join(f"{e:.5f}" for e in plain))
    for amount, errors in tried.items():
        chosen = "  chosen" if amount == best else ""
        print(f"  shrinkage {amount:<8g}" + "  ".join(f"{e:.5f}" for e in errors) + chosen)

    info = {
        "head": head.name,
        "head_sha256": head.sha256,
        "cache": cache_hashes(dataset),
        "data": dataset.label,
        "images": images,
        "probes": args.probes,
        "seed": args.seed,
        "shrinkage": best,
        "scale": float(moment.diagonal().mean() * (1 + best)),
        "validation": {str(a): errors for a, errors in tried.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_metric(path, TaskMetric(shrunk(moment, best), info))
    again = cli.flags_again(args, "head_model", "cache_dir", "device")
    print(
        f"wrote {path}; next: "
        f"python -m experiments.evaluate_task --head {head.name} --metric {path}{again}"
    )


@torch.inference_mode()
def validation_errors(
    head: TaskHead, loader: BatchLoader, metric: TaskMetric | None, label: str
) -> list[float]:
    """Mean task error at the ranks JUDGED_AT, of the metric's SVD or (None) of the plain one."""
    errors = []
    for batch in loader.with_progress(f"{label}, validation"):
        full = head.outputs(denormalise(batch.x, batch.mean, batch.std), batch.rows)
        found = []
        for rank in JUDGED_AT:
            rank = min(rank, *batch.x.shape[-2:])
            a, b = metric_svd(batch.x, rank, metric) if metric else gram_eigh(batch.x, rank)
            tokens = denormalise(a @ b, batch.mean, batch.std)
            found.append(head.error(head.outputs(tokens, batch.rows), full))
        errors.append(torch.stack(found, dim=-1))
    return torch.cat(errors).mean(0).tolist()


if __name__ == "__main__":
    cli.run(main, get_args_parser())
