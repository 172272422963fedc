"""Write the factors A and B of every image of a feature cache, with a trained network.

    python factorize.py --arch ResMLP --rank 64   # every image at rank 64
    python factorize.py --arch ResMLP --target_error 0.1 --dtype int8
    torchrun --nproc_per_node 2 factorize.py --arch ResMLP   # two processes

Writes factors/<arch>/ (format: lowrank_tokens/factor_files.py), from which `load_factors` gives
tokens back in the encoder's own units. Interrupted, the same command goes on. All reported errors
are of what was stored, after rounding to --dtype. Several processes share the images, into the same
bytes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from common import arguments, processes
from common.codecs import codec_for_cache
from heads.metric import load_metric, network_in_metric
from lowrank_tokens import progress
from lowrank_tokens.codec import Codec, CodedImage, SvdFactors
from lowrank_tokens.errors import rel_error, rest_note
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import (
    CODED,
    DTYPES,
    WRITE_AGAIN,
    FactorWriter,
    Stored,
    StoredImage,
    VisionTokens,
    copy_codec,
    damaged_files,
    restore,
    store,
)
from lowrank_tokens.files import sha256_file
from lowrank_tokens.grids import Grid, batches_of_one_grid
from lowrank_tokens.linalg import denormalise, normalise
from lowrank_tokens.stream import FACTORS, FORMS, TRANSFORM
from model import LowRankFactorModel, canonical_arch
from qwenvl_dataloader import RealQwenVLDataset
from training.checkpoint import cache_identity, evaluated_rank, open_trained
from training.rank_budget import error_curve, first_rank_as_stored, nested_factors, optimum_curve

TRIED_FIRST = 4  # images whose target is tried before anything is written
NOTED_IMAGES = 16  # whose error is measured without the channels or tokens that dominate it


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("factors")
    group.add_argument(
        "--arch", type=arguments.name, default="ResMLP", help="architecture of the trained network"
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--rank",
        type=arguments.positive_int,
        metavar="N",
        help="rank of every image's factors; default the trained (effective) rank",
    )
    size.add_argument(
        "--target_error",
        type=arguments.fraction,
        metavar="X",
        help="error that each image has to meet as stored, at its own smallest rank: rel_error; "
        "with --codec raw_error of the decoded tokens",
    )
    size.add_argument(
        "--step",
        type=arguments.Number(float, 1e-4, 1e4),
        metavar="X",
        help="with --codec: quantiser step of every image, in units of normalised tokens; a "
        "coarser step takes fewer bytes at a larger error",
    )
    size.add_argument(
        "--target_kb",
        type=arguments.positive_float,
        metavar="X",
        help="with --codec: most bytes of each image, in units of 1000",
    )
    group.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="bf16",
        help="type of A and B on disk; int8 has half the bytes of bf16 and the larger error",
    )
    group.add_argument(
        "--batch_size",
        type=arguments.batch_size,
        default=8,
        metavar="N",
        help="images factored at once",
    )
    group = parser.add_argument_group("coded tokens")
    group.add_argument(
        "--codec",
        type=arguments.file,
        metavar="FILE",
        help="codec of experiments.fit_codec: write coded tokens, a fraction of int8's bytes, at "
        "--step, --target_error or --target_kb",
    )
    group.add_argument(
        "--form",
        choices=FORMS,
        default=FACTORS,
        help="what a stream holds: A and B, or the transform of the tokens themselves, which has "
        "no A and B, needs no network, and codes and reads without a decomposition",
    )
    group.add_argument(
        "--exact", action="store_true", help="code exact factors, without a trained network"
    )
    group.add_argument(
        "--other_encoder",
        action="store_true",
        help="accept a codec that was fitted to another encoder's tokens; it takes two to five "
        "times the bytes",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=arguments.folder,
        metavar="DIR",
        help="folder to write; default factors/<arch>",
    )
    group.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    group.add_argument(
        "--verify",
        action="store_true",
        help="only check the files in --out against their hashes",
    )
    arguments.add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.verify:
        if processes.is_main():
            verify(args)
        return
    check_coded_flags(args)
    if args.exact or args.form == TRANSFORM:
        device, dataset = arguments.pick_device(args.device), RealQwenVLDataset(args.cache_dir)
        header, model, rank = {"arch": arch_name(args)}, None, None
    else:
        results, device, dataset, model, state = open_trained(args)
        header = {
            "arch": state["config"]["arch"],
            "checkpoint_sha256": sha256_file(results / "best_model.pt"),
        }
        rank = evaluated_rank(model, args.rank)
    metric = load_metric(args.metric, dataset).to(device) if args.metric else None
    if metric:
        model = network_in_metric(model, metric)
    # singular values of a native-resolution cache would cost more than the factors
    if args.target_error is not None and not args.codec and dataset.spectra_are_known:
        check_target(model, dataset, rank, args, device)
    header |= {
        "cache": cache_identity(dataset)
        | {"manifest_sha256": sha256_file(dataset.cache_dir / "manifest.json")},
        "dtype": CODED if args.codec else args.dtype,
        "rank": rank if args.target_error is None and not args.codec else None,
        "target_error": args.target_error,
        "grid": list(dataset.grid),
        "num_tokens": dataset.num_tokens,
        "tokens": sum(map(math.prod, dataset.grids)),
        "feature_dim": dataset.feature_dim,
        "count": len(dataset),
    } | ({"metric_sha256": metric.sha256} if metric else {})
    codec = open_codec(args, dataset, metric) if args.codec else None
    if codec:
        header |= {"codec_sha256": codec.sha256, "form": args.form}
        header |= {"step": args.step, "target_kb": args.target_kb}
        if args.step is None:
            check_coded_target(args, codec, model, dataset, device)
    folder = Path(args.out) if args.out else Path("factors") / header["arch"]
    with processes.sole_writer(folder, "--out"):
        write_factors(args, folder, header, model, dataset, device, codec)


def check_coded_flags(args: argparse.Namespace) -> None:
    """Refuse flags that only coded factors have without --codec, and the others with it."""
    if not args.codec:
        for flag in ("step", "target_kb", "exact", "form", "other_encoder"):
            if flag in args.typed:
                raise InputError(f"--{flag} is of coded tokens: name a --codec beside it")
        return
    for flag in ("rank", "dtype"):
        if flag in args.typed:
            raise InputError(f"--{flag} does nothing beside --codec: omit it")
    if args.step is None and args.target_kb is None and args.target_error is None:
        raise InputError("--codec needs one of --step, --target_error and --target_kb")
    if args.metric and (args.exact or args.form == TRANSFORM):
        beside = "--exact" if args.exact else "--form transform"
        raise InputError(f"--metric does nothing beside {beside}: the codec has its own metric")


def arch_name(args: argparse.Namespace) -> str:
    """Return the name of what factors where no network does."""
    return "transform" if args.form == TRANSFORM else "exact"


def open_codec(args: argparse.Namespace, dataset: RealQwenVLDataset, metric) -> Codec:
    """Open --codec. Raises InputError where it does not fit the cache or the metric."""
    otherwise = ", or type --other_encoder to go on all the same"
    codec = codec_for_cache(args.codec, dataset, args.other_encoder, otherwise)
    if args.exact or args.form == TRANSFORM:
        return codec
    own = codec.info.get("metric_sha256")
    if own != (metric.sha256 if metric else None):
        raise InputError(
            f"--codec {args.codec} was fitted {'in' if own else 'without'} a metric: the network "
            "has to factor in the same one, type the --metric of experiments.fit_codec or --exact"
        )
    return codec


def verify(args: argparse.Namespace) -> None:
    """Print that the factors in --out are as they were written, or raise InputError."""
    arguments.refuse_beside(args, "verify", {"out", "arch"})
    folder = Path(args.out) if args.out else Path("factors") / canonical_arch(args.arch)
    if damaged := damaged_files(folder):
        raise InputError(f"{folder}: {', '.join(damaged)} does not match its sha256: {WRITE_AGAIN}")
    print(f"{folder} is whole, every file matches its sha256")


def write_factors(
    args: argparse.Namespace,
    folder: Path,
    header: dict,
    model: LowRankFactorModel | None,
    dataset: RealQwenVLDataset,
    device: torch.device,
    codec: Codec | None,
) -> None:
    """Fill `folder`, from where it was left, and report; `header` says what with."""
    arch, rank = header["arch"], header["rank"] or (model and evaluated_rank(model, None))
    with processes.main_first():
        overwrite = args.overwrite and processes.is_main()
        writer = FactorWriter(folder, header, overwrite, max(map(math.prod, dataset.grids)))
        if codec and processes.is_main():
            copy_codec(Path(args.codec), folder)
    how = f"rank {rank}" if args.target_error is None else f"rel_error ≤ {args.target_error:g}"
    if codec:
        how = how_coded(args)
    print(f"{dataset.label}; {arch}, {how}, {header['dtype']}")
    small = 0 if codec else sum(math.prod(grid) < rank for grid in dataset.grids)
    if small:
        print(f"note: {small} images have fewer tokens than rank {rank}: each at its own limit")
    done = writer.rows_done
    to_do = len(dataset) - done
    if done:
        print(f"{done} images are already there, {to_do} to do")

    start = time.perf_counter()
    with processes.Progress(len(dataset), "factors", done) as bar:
        for shard in processes.own_part(writer.shards_to_do()):
            # batches begin anew with each shard: bits do not depend on where a run was interrupted,
            # nor on the number of processes
            if codec:
                rows = writer.rows_of(shard)
                coded = coded_rows(args, codec, model, dataset, device, rows, bar)
                writer.write_coded(shard, coded)
                continue
            images: dict[int, StoredImage] = {}
            rows = writer.rows_of(shard)
            for batch in batches_of_one_grid(rows, dataset.grids, args.batch_size):
                features, grid = dataset[batch].to(device), dataset.grids[batch[0]]
                try:
                    found = factorise(model, features, grid, rank, args.target_error, args.dtype)
                except InputError as error:
                    raise InputError(f"rows {batch[0]} to {batch[-1]}: {error}") from None
                images |= zip(batch, found, strict=True)
                bar.update(len(batch))
            writer.write_shard(shard, [images[row] for row in rows])
    seconds = time.perf_counter() - start
    if processes.is_main():
        report(writer.finish(), folder, to_do / seconds if to_do else None)
        if args.target_error is not None or args.target_kb is not None:
            rows = range(0, len(dataset), -(-len(dataset) // NOTED_IMAGES))
            written = VisionTokens(folder)
            note = rest_note([dataset[row] for row in rows], [written[row] for row in rows])
            if note:
                print(f"note: {note}")


def how_coded(args: argparse.Namespace) -> str:
    if args.step is not None:
        return f"step {args.step:g}"
    if args.target_kb is not None:
        return f"at most {args.target_kb:g} kB"
    return f"raw_error ≤ {args.target_error:g}"


@torch.inference_mode()
def coded_rows(
    args: argparse.Namespace,
    codec: Codec,
    model: LowRankFactorModel | None,
    dataset: RealQwenVLDataset,
    device: torch.device,
    rows: Iterable[int],
    bar,
) -> list[CodedImage]:
    """Code the rows' images. Raises InputError that names one whose target cannot be met."""
    images = []
    for row in rows:
        raw, grid = dataset[[row]][0].float().cpu(), dataset.grids[row]
        factors = None
        if model is not None:
            rank = evaluated_rank(model, None)
            x = normalise(codec.clean(raw)[None].to(device))[0]
            a, b = (f[0].cpu() for f in model(x, rank, grid=grid))
            if not (a.isfinite().all() and b.isfinite().all()):
                raise InputError("the model's factors are not finite: train it again")
            factors = SvdFactors(a, torch.ones(a.shape[1]), b.mT)
        try:
            image = codec.coded_image(
                raw,
                grid,
                step=args.step,
                error=args.target_error,
                max_bytes=None if args.target_kb is None else 1000 * args.target_kb,
                form=args.form,
                factors=factors,
            )
        except InputError as error:
            flag = next(f for f in ("step", "target_error", "target_kb") if vars(args)[f])
            raise InputError(f"row {row}: --{flag}: {error}: type a larger one") from None
        images.append(image)
        bar.update(1)
    return images


def check_target(
    model: LowRankFactorModel,
    dataset: RealQwenVLDataset,
    rank: int,
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Refuse a target_error that the hardest images cannot meet, before anything is written."""
    least = optimum_curve(dataset.singular_values, rank)[:, -1]
    hardest = least.topk(min(args.batch_size, len(dataset))).indices
    try:
        for batch in batches_of_one_grid(hardest.tolist(), dataset.grids, args.batch_size):
            features, grid = dataset[batch].to(device), dataset.grids[batch[0]]
            factorise(model, features, grid, rank, args.target_error, args.dtype)
    except InputError as error:
        raise InputError(f"the hardest images, as {args.dtype}: {error}") from None


def check_coded_target(
    args: argparse.Namespace,
    codec: Codec,
    model: LowRankFactorModel | None,
    dataset: RealQwenVLDataset,
    device: torch.device,
) -> None:
    """Refuse a target that hard images cannot meet as coded, before anything is written.

    Tried are those whose spectra are the flattest, or, of a cache whose spectra are not known, some
    that are spread over it: in the run itself another may still fail, and is named.
    """
    if dataset.spectra_are_known:
        half = dataset.singular_values.shape[1] // 2 + 1
        left = optimum_curve(dataset.singular_values, half)[:, -1]
        rows = left.topk(min(TRIED_FIRST, len(dataset))).indices.tolist()
    else:
        rows = range(0, len(dataset), -(-len(dataset) // TRIED_FIRST))
    with progress.bar(len(rows), "hardest images", show=False) as bar:
        coded_rows(args, codec, model, dataset, device, rows, bar)


@torch.inference_mode()
def factorise(
    model: LowRankFactorModel,
    features: torch.Tensor,
    grid: Grid,
    rank: int,
    target_error: float | None,
    dtype: str,
) -> list[StoredImage]:
    """Factors of features [b, T, D] of a grid as they will be stored, on the CPU.

    With a target_error each image gets the smallest rank ≤ `rank` at which what is stored meets it.
    Raises InputError where the target is out of reach, or where factors are not finite.
    """
    x, mean, std = normalise(features)
    if target_error is None:
        a, b = model(x, rank, grid=grid)
        ranks = [a.shape[-1]] * len(x)  # at most the image's own limit
    else:
        a, b = nested_factors(model, x, rank, grid)
    if not (a.isfinite().all() and b.isfinite().all()):  # int8 would hide it
        raise InputError("the model's factors are not finite: train it again")
    stored = store(a, b, dtype)
    if target_error is not None:
        # rounding leaves components apart, so one curve holds the stored error at every rank
        curve = error_curve(x, *restore(stored))
        ranks = first_rank_as_stored(curve, target_error).tolist()
        for i, r in enumerate(ranks):  # the columns that are left out
            for tensor in (a[i, :, r:], b[i, r:], stored.a[i, :, r:], stored.b[i, r:]):
                tensor.zero_()
    kept_a, kept_b = restore(stored)
    original = denormalise(kept_a @ kept_b, mean, std)
    norm = torch.linalg.matrix_norm(features.double()).clamp_min(torch.finfo(torch.float64).tiny)
    errors = {
        "rel_error": rel_error(x, kept_a, kept_b),
        "rel_error_float32": rel_error(x, a, b),
        "rel_error_original": torch.linalg.matrix_norm((features - original).double()) / norm,
    }
    images = []
    for i, r in enumerate(ranks):
        scales = (s[i, :r].cpu() for s in stored[2:] if s is not None)
        kept = Stored(stored.a[i, :, :r].cpu(), stored.b[i, :r].cpu(), *scales)
        measured = {name: float(e[i]) for name, e in errors.items()}
        images.append(StoredImage(kept, grid, mean[i].cpu(), std[i].cpu(), measured))
    return images


def report(manifest: dict, folder: Path, per_second: float | None) -> None:
    """Print errors, bytes before and after, and the speed of this run."""
    errors, ranks = manifest["errors"], manifest["ranks"]
    if manifest["rank"] is None or ranks["min"] < ranks["max"]:
        print(
            f"rank per image: mean {ranks['mean']:.1f}, p90 {ranks['p90']:.0f}, "
            f"{ranks['min']} to {ranks['max']}"
        )
    lines = {
        "rel_error": f"rel_error as stored ({manifest['dtype']})",
        "rel_error_float32": "rel_error in float32",
        "rel_error_original": "as stored, in the encoder's units",
    }
    for name, words in lines.items():
        if name not in errors:  # coded factors have none before rounding
            continue
        print(f"{words:<34} mean {errors[name]['mean']:.5f}  p90 {errors[name]['p90']:.5f}")
    before = 2 * manifest["tokens"] * manifest["feature_dim"]
    after = sum(shard["bytes"] for shard in manifest["shards"])
    print(
        f"{before / 1e6:.1f} MB of bf16 features, {after / 1e6:.1f} MB of factors: "
        f"ratio {before / after:.2f}"
    )
    if manifest["dtype"] == CODED:
        print(f"{after / manifest['count']:.0f} bytes an image, codec.safetensors beside them")
    if per_second is not None:
        print(f"{per_second:.1f} matrices per second (reading, factors, their errors, writing)")
    print(f'wrote {folder}: lowrank_tokens.load_factors("{folder}") gives tokens back')


if __name__ == "__main__":
    processes.run(main, get_args_parser())
