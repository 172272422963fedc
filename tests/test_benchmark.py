"""The benchmark: fair to every method, complete, and never below the optimum. No time is judged."""

import json

import pytest
import torch
from drawing import title

import svd_baseline
import train_real_data
from common import arguments
from experiments import benchmark
from figures.benchmark import error_against_time, front
from lowrank_tokens.linalg import exact_factors
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real

CPU = torch.device("cpu")
METHODS = {"network", "random_sketch", "svd", "gram_eigh_f32", "gram_eigh_f64", "svd_lowrank"}
METHODS.add("pca")


@pytest.fixture(scope="module")
def results(tiny_cache, tmp_path_factory):
    """A results folder with one ResMLP of rank 4 and six sketch columns."""
    folder = tmp_path_factory.mktemp("benchmark") / "results"
    flags = f"--cache_dir {tiny_cache} --results_dir {folder} --log_dir {folder.parent} --epochs 1"
    flags += " --rank 4 --oversample 2 --refine_steps 1 --hidden_dim 16 --device cpu"
    args = arguments.parse(train_real_data.get_args_parser(), flags.split())
    assert train_real_data.main(args) == 0
    return folder


@pytest.fixture(autouse=True)
def quick_pca(monkeypatch):
    """Principal axes of the first training image: all of them take a second and a half."""

    def axes(batches):
        return torch.linalg.svd(next(iter(batches))[:2].flatten(0, 1), full_matrices=False)[2].mT

    monkeypatch.setattr(benchmark, "fit_pca", axes)


@pytest.fixture
def measured(script, tiny_cache):
    """Run the benchmark on the small cache; returns what it printed and its JSON."""

    def run(results, *flags):
        where = ["--cache_dir", tiny_cache, "--results_dir", results, "--device", "cpu"]
        done = script("experiments.benchmark", *where, "--repeats", 1, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((results / "benchmark.json").read_text())

    return run


@pytest.mark.painted
def test_every_method_is_measured_at_every_rank_and_none_beats_the_svd(results, measured):
    _, found = measured(results, "--ranks", 2, 4, "--batch_size", 2)
    records = found["records"]
    for rank in (2, 4):
        here = [r["method"] for r in records if r["rank"] == rank]
        assert set(here) == METHODS and len(here) == len(METHODS)
    for record in records:
        assert record["ms_median"] > 0 and record["ms_iqr"] >= 0 and record["tokens"] == 16
        assert record["matrices_per_s"] == pytest.approx(1e3 / record["ms_median"])
        assert record["peak_mb"] is None and record["device"] == "cpu"
        assert record["excess_mean"] > -1e-4 and record["excess_p90"] > -1e-4
        assert (record["floor_ms"] is None) == (record["method"] == "svd")
        if record["method"] in ("svd", "gram_eigh_f64"):
            assert abs(record["excess_mean"]) < 1e-4
    by = {r["method"]: r for r in records if r["rank"] == 2}
    assert [by["network"][k] for k in ("K", "p")] == [by["random_sketch"][k] for k in ("K", "p")]
    assert (by["network"]["arch"], by["network"]["sketch"]) == ("ResMLP", "trained")
    assert (results / "benchmark.png").stat().st_size > 10_000


def test_the_errors_are_those_of_the_comparison_on_the_test_images(results, measured, tiny_cache):
    _, found = measured(results, "--ranks", 3, "--quality")
    test = create_data_loaders_real(RealQwenVLDataset(tiny_cache), 4).test
    expected = {
        "random_sketch": lambda x: svd_baseline.random_sketch(x, 3, steps=1, columns=6),
        "svd_lowrank": lambda x: svd_baseline.randomized_svd(x, 3),
    }
    for record in found["records"]:
        assert record["ms_median"] is record["floor_fraction"] is None
        if record["method"] in expected:
            excess = svd_baseline.evaluate(expected[record["method"]], test)["excess_pct"]
            assert record["excess_mean"] == pytest.approx(float(excess.mean()), rel=1e-3)


def test_without_a_network_an_untrained_one_stands_in_and_is_called_so(measured, tmp_path):
    printed, found = measured(tmp_path / "nowhere", "--ranks", 4, "--batch_size", 2)
    assert "note: no trained network" in printed
    (network,) = [r for r in found["records"] if r["method"] == "network"]
    assert network["sketch"] == "untrained" and network["excess_mean"] > 0


def test_squares_of_tokens_are_cut_from_test_images_or_tiled_of_several(tiny_cache):
    dataset = RealQwenVLDataset(tiny_cache)
    test = create_data_loaders_real(dataset, 4).test
    first = dataset[test.sampler.rows[:1].tolist()][0].float().view(4, 4, -1)
    small = benchmark.test_matrices(test, 9, 1)
    large = benchmark.test_matrices(test, 36, 2)
    assert small.grid == (3, 3) and large.grid == (6, 6)
    assert small.x.shape == (1, 9, 1536) and large.x.shape == (2, 36, 1536)
    for found in (small, large):  # rows are normalised, so they agree up to length and mean
        side = min(found.grid[0], 4)
        own = found.x[0].view(*found.grid, -1)[:side, :side]
        wanted = torch.nn.functional.layer_norm(first[:side, :side], (1536,), eps=1e-6)
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


def test_several_sizes_are_measured_in_one_run_and_drawn(measured, tmp_path, drawn):
    _, found = measured(tmp_path, "--tokens", 16, 36, "--ranks", 4, 20, "--batch_size", 2)
    sizes = {(r["tokens"], r["rank"]) for r in found["records"]}
    assert sizes == {(16, 4), (36, 4), (36, 20)}
    assert len(drawn[-1].axes) == 2 and "rank 4" in title(drawn[-1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ranks 4 17", "--ranks 17 is out of range: type 1 to 16"),
        ("--tokens 17", "type 16 or 25"),
        ("--cache_dir nowhere", "nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(flags, message, tiny_cache, tmp_path, script):
    done = script("experiments.benchmark", "--cache_dir", tiny_cache, *flags.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr and list(tmp_path.iterdir()) == []


def test_methods_take_turns():
    calls = []
    seconds = benchmark.measure_times([lambda n=n: calls.append(n) for n in "ab"], 2, 1)
    assert "".join(calls).replace("aa", "a").replace("bb", "b").count("ab") >= 2
    assert [len(s) for s in seconds] == [2, 2]


def test_only_matrix_products_count_towards_the_floor():
    x = torch.randn(2, 24, 40)
    products = 2 * (2 * 24 * 24 * 40 + 2 * 3 * 24 * 40)  # X Xᵀ, then UᵀX
    assert benchmark.count_flops(lambda: exact_factors(x, 3)) == products
    assert benchmark.count_flops(lambda: torch.linalg.svd(x)) == 0


def test_speed_of_training_and_tower_are_one_line_each(tiny_cache):
    dataset = RealQwenVLDataset(tiny_cache)
    x = create_data_loaders_real(dataset, 2).test.__iter__().__next__().x
    assert "images/s" in benchmark.training_speed(x, 4, CPU, 1)
    assert "images/s" in benchmark.tower_speed(dataset, 1, CPU, 1)


def records(*points):
    names = ["pca", "network", "gram_eigh_f64", "svd", "random_sketch"]
    shared = {"K": None, "p": None, "rank": 4, "tokens": 16, "ms_iqr": 0.1, "sketch": None}
    return [
        {**shared, "method": name, "arch": None, "ms_median": ms, "excess_mean": excess}
        for name, (ms, excess) in zip(names, points, strict=False)
    ]


def test_the_front_is_what_nothing_beats_and_rounding_of_either_sign_is_equal():
    found = records((1, 900.0), (5, 0.1), (8, -1e-9), (40, 1e-12), (6, 0.2))
    assert front(found) == [0, 1, 2]
    assert front(records((1, None), (5, 0.1), (8, 0.1))) == [1]


def test_an_undefined_excess_is_labelled_and_drawn_at_the_edge(tmp_path, drawn):
    error_against_time(tmp_path / "p.png", records((1, None), (9, None)), "footer")
    words = [text.get_text() for text in drawn[0].axes[0].texts]
    assert sum("undefined" in w and "rounding" not in w for w in words) == 2
