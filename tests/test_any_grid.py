"""Everything that works on images of one size works on images of four grids in one cache."""

import json
import math
import shutil

import pytest
import torch
from forked import command, killed
from matplotlib.figure import Figure
from test_distributed import finished, torchrun
from test_training import equal, interrupt_after

import visualize_svd_nn
from common import arguments
from experiments.coded_rivals import Coded, CodedTransform
from experiments.rivals import PcaDeflate, decompose
from heads.saliency import SaliencyHead, split_neighbours
from lowrank_tokens.codec import Codec
from lowrank_tokens.errors import optimum, rel_error
from lowrank_tokens.factor_files import VisionTokens
from lowrank_tokens.grids import batches_of_one_grid, resampled
from lowrank_tokens.linalg import normalise
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real
from training.checkpoint import load_checkpoint, load_model

RANK = 24  # more than the 20 tokens of the smallest images
SMALL = f"--rank {RANK} --oversample 4 --refine_steps 1 --hidden_dim 16 --epochs 2 --lr 1e-3"


def training(cache, folder, *flags):
    where = ["--cache_dir", cache, "--results_dir", folder, "--log_dir", folder / "log"]
    return [*map(str, where), *SMALL.split(), "--batch_size", "4", *flags]


def train(argv):
    import train_real_data

    return train_real_data.main(arguments.parse(train_real_data.get_args_parser(), argv))


@pytest.fixture(scope="module")
def trained(ragged_cache, tmp_path_factory):
    """Results of two epochs of ResMLP on the ragged cache."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(training(ragged_cache, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def dataset(ragged_cache):
    return RealQwenVLDataset(ragged_cache)


@pytest.fixture(scope="module")
def saliency(dataset):
    return SaliencyHead(dataset, "cpu")


def one_by_one(dataset, rows):
    """x [1, T_i, D] of each row, its grid and its singular values by torch's own SVD."""
    for row in rows:
        x = normalise(dataset[[row]])[0]
        yield x, dataset.grids[row], torch.linalg.svdvals(x.double())


def test_reading_gives_batches_of_one_grid_with_the_singular_values_of_their_own_images(dataset):
    seen = []
    for batch in create_data_loaders_real(dataset, 4).val:
        seen.append(batch.grid)
        assert batch.x.shape[1] == math.prod(batch.grid)
        expected = torch.linalg.svdvals(batch.x.double())
        assert torch.allclose(batch.singular_values, expected, atol=1e-4)
    assert len(set(seen)) > 2


def test_the_split_is_of_photographs_whatever_their_grids(dataset, ragged_cache):
    square = RealQwenVLDataset(ragged_cache.parent / "square")
    assert dataset.split.hash == square.split.hash
    split, groups = dataset.split, dataset.rows["group"]
    parts = [set(groups.take(r.tolist()).to_pylist()) for r in (split.train, split.val, split.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_training_reports_the_errors_of_images_factored_one_by_one(dataset, trained):
    model, state = load_model(trained / "ResMLP" / "best_model.pt", torch.device("cpu"), dataset)
    record = state["progress"]["history"][state["progress"]["best_epoch"]]
    with torch.inference_mode():
        errors, best = [], []
        for x, grid, sigma in one_by_one(dataset, dataset.split.val.tolist()):
            a, b = model(x, grid=grid)
            assert a.shape[-1] == min(RANK, x.shape[1])
            errors.append(float(rel_error(x, a, b)))
            best.append(float(optimum(sigma, RANK)))
    assert record["val_rel_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    # nothing beats the SVD; the ridge of 1e-4 is all that an image at its own limit lacks
    assert all(e > b - 1e-6 for e, b in zip(errors, best, strict=True))


def test_a_run_stopped_between_grids_resumes_to_the_unbroken_run_bit_for_bit(
    ragged_cache, trained, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)  # in the first epoch, whose steps are of four grids
        assert train(training(ragged_cache, tmp_path)) != 0
    where = ["--cache_dir", ragged_cache, "--results_dir", tmp_path, "--log_dir", tmp_path / "log"]
    assert train([*map(str, where), "--resume", "last"]) == 0
    same_run(tmp_path, trained)


def same_run(folder, unbroken):
    found, expected = (load_checkpoint(f / "ResMLP" / "last_model.pt") for f in (folder, unbroken))
    for key in ("model", "optimizer", "scheduler", "rng", "progress"):
        assert equal(found[key], expected[key]), key


def test_a_run_killed_in_a_write_goes_on_to_the_unbroken_run(ragged_cache, trained, tmp_path):
    import train_real_data

    run = command(train_real_data, *training(ragged_cache, tmp_path))
    assert killed(run, 7, "half written").status == -9  # after the first checkpoints
    where = ["--cache_dir", ragged_cache, "--results_dir", tmp_path, "--log_dir", tmp_path / "log"]
    assert train([*map(str, where), "--resume", "last"]) == 0
    same_run(tmp_path, trained)


@pytest.mark.slow
def test_two_processes_train_the_network_of_one(ragged_cache, trained, tmp_path):
    argv = training(ragged_cache, tmp_path)
    argv[argv.index("--batch_size") + 1] = "2"
    finished(torchrun("train_real_data.py", *argv))
    histories = [
        json.loads((f / "ResMLP" / "history.json").read_text()) for f in (tmp_path, trained)
    ]
    for found, expected in zip(*histories, strict=True):
        for name in ("train_mse", "val_mse", "val_optimum_mse", "val_rel_error"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=2e-4), name


def test_the_comparison_s_means_are_those_of_images_factored_one_by_one(
    dataset, ragged_cache, trained, script, tmp_path
):
    folder = shutil.copytree(trained, tmp_path / "results")
    where = ["--cache_dir", ragged_cache, "--results_dir", folder]
    done = script("compare_svd_nn.py", *where, "--target_error", 0.3)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "ResMLP" / "svd_nn_comparison.json").read_text())
    rows = dataset.split.test.tolist()
    model = load_model(folder / "ResMLP" / "best_model.pt", torch.device("cpu"), dataset)[0]
    for rank in (8, RANK):
        with torch.inference_mode():
            both = [
                (float(rel_error(x, *model(x, rank, grid=grid))), float(optimum(sigma, rank)))
                for x, grid, sigma in one_by_one(dataset, rows)
            ]
        network, svd = (sum(values) / len(both) for values in zip(*both, strict=True))
        means = found["ranks"][str(rank)]
        assert means["network"]["rel_error"]["mean"] == pytest.approx(network, rel=1e-4)
        assert means["svd"]["rel_error"]["mean"] == pytest.approx(svd, rel=1e-4)
        assert means["random_sketch"]["excess_pct"]["mean"] > 0
    tokens = [math.prod(dataset.grids[row]) for row in rows]
    assert found["num_tokens"] == pytest.approx(sum(tokens) / len(tokens))
    budget = found["rank_per_image"]["svd"]
    assert budget["fixed"]["stored_values"] >= budget["stored_values"]
    assert budget["rel_error"]["max"] <= 0.3


def test_figures_draw_photograph_and_tokens_in_the_image_s_own_grid(
    dataset, ragged_cache, trained, tmp_path, monkeypatch
):
    drawn = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda f, path, **_: (drawn.update({path.name: f}), path.touch())
    )
    folder = shutil.copytree(trained, tmp_path / "results")
    wide, tall = dataset.grids.index((6, 8)), dataset.grids.index((8, 6))
    for row in (wide, tall):
        argv = ["--cache_dir", ragged_cache, "--results_dir", folder, "--image_idx", row]
        args = arguments.parse(visualize_svd_nn.get_args_parser(), list(map(str, argv)))
        visualize_svd_nn.main(args)
    assert len(drawn) == 6
    for row in (wide, tall):
        height, width = dataset.grids[row]
        own = [figure for name, figure in drawn.items() if f"image_{row}_" in name]
        images = [image for figure in own for ax in figure.axes for image in ax.images]
        maps = [i for i in images if i.get_array().shape[:2] == (height, width)]
        photographs = [i for i in images if i.get_array().shape[0] > 20]
        assert len(maps) > 30 and len(photographs) == 4 and len(own) == 3
        # one of each figure, and that under the map of the network's error
        assert {tuple(i.get_extent()) for i in photographs} == {(0, width, height, 0)}


def test_a_map_is_resampled_to_another_grid_by_its_places_and_keeps_its_mean():
    across = torch.linspace(0, 1, 8).repeat(4, 1).flatten()[None]  # grows to the right, 4 × 8
    found = resampled(across, (4, 8), (6, 4)).unflatten(1, (6, 4))[0]
    assert (found.diff(dim=1) > 0.1).all() and (found.diff(dim=0).abs() < 1e-6).all()
    assert float(found.mean()) == pytest.approx(0.5, abs=1e-6)
    assert resampled(across, (4, 8), (4, 8)) is across


@pytest.mark.slow
@pytest.mark.parametrize("coded", [False, True])
def test_factors_and_coded_factors_keep_each_image_on_its_grid_within_the_target(
    coded, dataset, ragged_cache, trained, script, tmp_path
):
    target, flags = 0.3, ["--cache_dir", ragged_cache, "--out", tmp_path / "factors"]
    if coded:
        codec = tmp_path / "codec.safetensors"
        done = script("experiments.fit_codec", "--cache_dir", ragged_cache, "--out", codec)
        assert done.returncode == 0, done.stderr
        flags += ["--exact", "--codec", codec]
    else:
        flags += ["--results_dir", trained]
    done = script("factorize.py", *flags, "--target_error", target)
    assert done.returncode == 0, done.stderr
    tokens = VisionTokens(tmp_path / "factors")
    for row, grid in enumerate(dataset.grids):
        raw = dataset[[row]][0].float()
        assert tokens.grid_of(row) == grid
        apart = raw - tokens[row]
        if not coded:  # its target is of the normalised tokens
            apart, raw = (
                normalise(raw)[0] - (tokens[row] - normalise(raw)[1]) / normalise(raw)[2],
                normalise(raw)[0],
            )
        assert apart.norm() / raw.norm() <= target + 0.01


@pytest.mark.slow
def test_a_codec_of_all_grids_takes_fewer_bytes_on_a_rarer_grid_than_one_of_the_main_grid_alone(
    dataset, ragged_cache, script, tmp_path
):
    train = dataset.split.train

    def batches(rows):
        parts = batches_of_one_grid(rows.tolist(), dataset.grids, 8)
        return [(dataset[part], dataset.grids[part[0]]) for part in parts]

    alone = Codec.fit(batches(dataset.of_main_grid(train)), grid=dataset.grid)
    out = tmp_path / "all.safetensors"
    done = script("experiments.fit_codec", "--cache_dir", ragged_cache, "--out", out)
    assert f"{len(train)} training images of 4 grids, tables of 8 x 8" in done.stdout
    both = Codec.load(out)
    assert both.info["images"] == len(train) > alone.info["images"]
    held_out = torch.cat([dataset.split.val, dataset.split.test]).tolist()
    sizes = torch.tensor(
        [
            [len(codec.encode(raw, grid, error=0.3)) for codec in (alone, both)]
            for row in held_out
            if (grid := dataset.grids[row]) != dataset.grid
            for raw in [dataset[[row]][0].float()]
        ]
    ).double()
    assert len(sizes) >= 4
    assert float((sizes[:, 1] / sizes[:, 0]).log().mean().exp()) < 0.97


@pytest.mark.slow
def test_bytes_are_compared_on_test_images_of_every_grid_by_every_method(
    dataset, ragged_cache, script, tmp_path, monkeypatch
):
    monkeypatch.setattr(PcaDeflate, "knobs", (16,))
    monkeypatch.setattr(Coded, "knobs", (4.0, 1.0))
    monkeypatch.setattr(CodedTransform, "knobs", (4.0, 1.0))
    codec = tmp_path / "codec.safetensors"
    where = ["--cache_dir", ragged_cache]
    assert script("experiments.fit_codec", *where, "--out", codec).returncode == 0
    flags = [*where, "--codec", codec, "--results_dir", tmp_path, "--device", "cpu"]
    done = script("experiments.compare_bytes", *flags)
    assert done.returncode == 0, done.stderr
    assert "note: no picture codecs of a native-resolution cache" in done.stdout
    found = json.loads((tmp_path / "bytes.json").read_text())
    rows = dataset.split.test.tolist()
    tokens = torch.tensor([math.prod(dataset.grids[row]) for row in rows]).double()
    assert len(tokens.unique()) > 1 and found["n_images"] == len(rows)
    names = "bf16 factors_quantised factors_deflate tokens_averaged"
    names += " tokens_dropped coded transform factors_head_steps pca_deflate"
    assert found["methods"].keys() == set(names.split())
    assert found["methods"]["bf16"][0]["bytes"]["mean"] == 2 * 1536 * float(tokens.mean())
    one_by_one = []
    for row in rows:
        raw, grid = dataset[[row]][0].float(), dataset.grids[row]
        data = Codec.load(codec).encode(raw, grid, step=1.0)
        apart = Codec.load(codec).decode(data) - raw
        one_by_one.append([len(data), float(apart.norm() / raw.norm())])
    size, error = torch.tensor(one_by_one).double().mean(0).tolist()
    point = found["methods"]["coded"][1]
    assert point["bytes"]["mean"] == pytest.approx(size, rel=1e-3)
    assert point["raw_error"]["mean"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_factors_for_the_comparison_of_bytes_are_the_svd_with_more_tokens_than_features_too(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, sigma, v = decompose(x)
    assert (u.shape, v.shape) == ((shape[0], 12), (12, shape[1]))
    assert torch.allclose(sigma, torch.linalg.svdvals(x), atol=1e-4)
    assert torch.allclose(u * sigma @ v, x, atol=1e-4)
    assert torch.allclose(u.mT @ u, torch.eye(12), atol=1e-4)


def test_the_saliency_head_reads_an_image_of_any_grid_as_its_decoder_does(dataset, saliency):
    for grid in set(dataset.grids):
        rows = [row for row, own in enumerate(dataset.grids) if own == grid][:2]
        tokens = dataset[rows].float()
        logits = saliency.outputs(tokens, torch.tensor(rows))
        assert logits.shape[1:] == (16 * grid[0], 16 * grid[1])
        expected = saliency.decoder(split_neighbours(tokens, grid))
        assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
def test_metric_and_task_error_are_of_images_of_every_grid(
    dataset, ragged_cache, trained, script, tmp_path
):
    metric, folder = tmp_path / "metric.safetensors", shutil.copytree(trained, tmp_path / "results")
    where = ["--cache_dir", ragged_cache]
    few = ["--probes", 1, "--shrinkage", 0.01, "--out", metric]
    assert script("experiments.estimate_metric", *where, *few).returncode == 0
    argv = [*where, "--results_dir", folder, "--metric", metric, "--head", "saliency"]
    done = script("compare_svd_nn.py", *argv)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "ResMLP" / "svd_nn_comparison.json").read_text())
    grids = [dataset.grids[row] for row in dataset.split.test.tolist()]
    assert found["n_images"] == len(grids) and len(set(grids)) > 2
    # what images lack at rank 8 is seen, and at 24 the smallest lack nothing
    task = found["task"]["ranks"]
    assert task[str(RANK)]["svd"]["mean"] < task["8"]["svd"]["mean"]


@pytest.mark.parametrize("name", ["features-00000.safetensors", "rows.parquet", "manifest.json"])
def test_a_flipped_byte_of_a_ragged_cache_is_found_and_its_file_named(
    name, ragged_cache, script, tmp_path
):
    cache = shutil.copytree(ragged_cache, tmp_path / "cache")
    data = bytearray((cache / name).read_bytes())
    if name == "manifest.json":
        where = data.index(b'"count": 36') + len('"count": 3')
        data[where] = ord("5")
    else:
        data[len(data) // 2] ^= 1
    (cache / name).write_bytes(data)
    done = script("extract_features.py", "--verify", "--cache_dir", cache)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert name in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_benchmark_judges_a_network_of_a_ragged_cache_at_its_most_frequent_grid(
    dataset, ragged_cache, tiny_cache, script, tmp_path
):
    where = ["--results_dir", tmp_path / "results", "--device", "cpu"]
    small = "--epochs 1 --rank 4 --oversample 2 --hidden_dim 8".split()
    done = script("train_real_data.py", "--cache_dir", ragged_cache, *where, *small)
    assert done.returncode == 0, done.stderr
    few = ["--ranks", 4, "--repeats", 1, "--batch_size", 2]
    done = script("experiments.benchmark", "--cache_dir", ragged_cache, *where, *few)
    assert done.returncode == 0, done.stderr
    test = dataset.split.test.tolist()
    own = sum(dataset.grids[row] == dataset.grid for row in test)
    assert f"note: images of 8 × 8 tokens only, {own} of {len(test)} test images" in done.stdout
    records = json.loads((tmp_path / "results" / "benchmark.json").read_text())["records"]
    (network,) = [r for r in records if r["method"] == "network"]
    assert network["excess_mean"] < 20 and network["ms_median"] > 0
    done = script("experiments.benchmark", "--cache_dir", tiny_cache, *where, *few)
    assert done.returncode == 2 and "was trained on a cache with" in done.stderr
    assert done.stderr.count("\n") == 1
