"""The benchmark: fair to every method, complete, and never below the optimum. No time is judged."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import svd_baseline
import train_real_data
from common import arguments
from experiments import benchmark, contenders, timing
from figures import error_against_time
from lowrank_tokens.errors import rel_error
from lowrank_tokens.linalg import exact_factors
from model import get_model_by_name
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real

KEYS = [
    "method",
    "arch",
    "sketch",
    "K",
    "p",
    "rank",
    "device",
    "threads",
    "dtype",
    "batch",
    "ms_median",
    "ms_iqr",
    "matrices_per_s",
    "peak_mb",
    "excess_mean",
    "excess_p90",
    "floor_ms",
    "floor_fraction",
]
METHODS = {
    "network",
    "random_sketch",
    "svd",
    "gram_eigh_f32",
    "gram_eigh_f64",
    "svd_lowrank",
    "pca",
}
CPU = torch.device("cpu")


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
        return torch.linalg.svd(next(iter(batches))[0], full_matrices=False)[2].mT

    monkeypatch.setattr(contenders, "fit_pca", axes)


def measured(script, tiny_cache, results, *flags):
    done = script(
        "experiments.benchmark",
        "--cache_dir",
        tiny_cache,
        "--results_dir",
        results,
        "--device",
        "cpu",
        "--repeats",
        2,
        *flags,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((results / "benchmark.json").read_text())


def test_every_method_is_measured_at_every_rank_and_none_beats_the_svd(results, tiny_cache, script):
    printed, found = measured(script, tiny_cache, results, "--ranks", 2, 4, "--batch_size", 2, 8)
    records = found["records"]
    assert all(list(record) == KEYS for record in records)
    for batch in (2, 8):
        for rank in (2, 4):
            here = [r for r in records if (r["batch"], r["rank"]) == (batch, rank)]
            assert {r["method"] for r in here} == METHODS and len(here) == len(METHODS)
    for record in records:
        assert record["ms_median"] > 0 and record["ms_iqr"] >= 0
        assert record["matrices_per_s"] == pytest.approx(1e3 / record["ms_median"])
        assert record["peak_mb"] is None and record["device"] == "cpu"
        assert record["excess_mean"] > -1e-4 and record["excess_p90"] > -1e-4
        assert (record["floor_ms"] is None) == (record["method"] == "svd")
        if record["method"] in ("svd", "gram_eigh_f64"):
            assert abs(record["excess_mean"]) < 1e-4
    by = {r["method"]: r for r in records if (r["batch"], r["rank"]) == (8, 2)}
    columns = ("K", "p", "threads")
    assert [by["network"][k] for k in columns] == [by["random_sketch"][k] for k in columns]
    assert (by["network"]["arch"], by["network"]["K"], by["network"]["p"]) == ("ResMLP", 1, 2)
    assert "repeats the 6 test images" in printed and "how to read it" in printed
    with Image.open(results / "benchmark.png") as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_the_errors_are_those_of_the_comparison_on_the_test_images(results, tiny_cache, script):
    _, found = measured(script, tiny_cache, results, "--ranks", 3, "--quality")
    dataset = RealQwenVLDataset(tiny_cache)
    test = create_data_loaders_real(dataset, 4).test
    expected = {
        "random_sketch": lambda x: svd_baseline.random_sketch(x, 3, steps=1, columns=6),
        "svd_lowrank": lambda x: svd_baseline.randomized_svd(x, 3),
    }
    for record in found["records"]:
        assert record["ms_median"] is record["floor_fraction"] is record["batch"] is None
        if record["method"] in expected:
            excess = svd_baseline.evaluate(expected[record["method"]], test)["excess_pct"]
            assert record["excess_mean"] == pytest.approx(float(excess.mean()), rel=1e-4)


def test_every_timed_call_forms_a_and_b_of_the_same_first_test_images(
    results, tiny_cache, script, monkeypatch
):
    dataset = RealQwenVLDataset(tiny_cache)
    x = next(iter(create_data_loaders_real(dataset, 2).test)).x
    products = []

    def look(calls, repeats, device):
        with torch.inference_mode():
            factors = [call() for call in calls]
        assert {(a.shape, b.shape) for a, b in factors} == {((2, 16, 15), (2, 15, 1536))}
        products.extend(a @ b for a, b in factors)
        return [timing.Timing([1.0] * repeats, None) for _ in calls]

    monkeypatch.setattr(benchmark, "time_in_turn", look)
    measured(script, tiny_cache, results, "--speed", "--ranks", 15, "--batch_size", 2)
    assert len(products) == len(METHODS) - 1  # the network ends at rank 4
    # nearly all of X is in 15 of 16 components, unless the basis is another image's
    errors = [rel_error(x, product, torch.eye(1536)) for product in products]
    assert sum(bool((error < 0.2).all()) for error in errors) >= len(METHODS) - 2


def test_without_a_network_the_references_are_measured_with_a_note(tiny_cache, tmp_path, script):
    nowhere = tmp_path / "nowhere"
    printed, found = measured(script, tiny_cache, nowhere, "--speed")
    assert "note: no trained network" in printed and "not drawn" in printed
    assert {r["method"] for r in found["records"]} == METHODS - {"network"}
    assert {r["rank"] for r in found["records"]} == {8, 16}  # the defaults that T = 16 allows
    sketch = {r["rank"]: r for r in found["records"] if r["method"] == "random_sketch"}
    assert (sketch[8]["K"], sketch[8]["p"], sketch[16]["p"]) == (1, 8, 0)  # p at most T − r
    assert all(r["excess_mean"] is None and r["ms_median"] > 0 for r in found["records"])
    assert not (nowhere / "benchmark.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ranks 4 17", "--ranks 17 is out of range: type 1 to 16"),
        ("--ranks 0", "--ranks"),
        ("--threads 0", "--threads"),
        ("--device tpu", "--device tpu"),
        ("--cache_dir nowhere", "nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(flags, message, tiny_cache, tmp_path, script):
    done = script("experiments.benchmark", "--cache_dir", tiny_cache, *flags.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr and list(tmp_path.iterdir()) == []


def test_methods_take_turns_and_every_other_repeat_is_in_reverse():
    calls = []
    timings = timing.time_in_turn([lambda n=n: calls.append(n) for n in "abc"], 3, CPU)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"  # the first is the warm-up
    assert [len(t.seconds) for t in timings] == [3, 3, 3]


def test_products_are_counted_by_data_type_as_many_as_torch_counts_and_nothing_else():
    x = torch.randn(2, 24, 40)
    counted = timing.matrix_products(lambda: exact_factors(x, 3))
    # X Xᵀ in float64; UᵀX in float32
    assert counted == {"float64": 2 * 24 * 24 * 40, "float32": 2 * 3 * 24 * 40}
    assert timing.matrix_products(lambda: torch.linalg.svd(x)) == {}
    for arch in ("ResMLP", "MLP"):
        model = get_model_by_name(arch, input_dim=520, num_tokens=24, rank=4, hidden_dim=16).eval()
        x = torch.randn(2, 24, 520)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        counted = timing.matrix_products(lambda m=model, x=x: m(x))
        assert counter.get_total_flops() == 2 * sum(counted.values())
        assert set(counted) == {"float32", "float64"}


def records(*points):
    names = ["pca", "network", "gram_eigh_f64", "svd", "random_sketch"]
    return [
        {
            "method": name,
            "arch": "MLP" if name == "network" else None,
            "K": None,
            "p": None,
            "rank": 4,
            "device": "cpu",
            "threads": 1,
            "batch": 8,
            "ms_median": ms,
            "ms_iqr": 0.1,
            "excess_mean": excess,
        }
        for name, (ms, excess) in zip(names, points, strict=False)
    ]


def test_the_front_is_what_nothing_beats_and_rounding_of_either_sign_is_equal():
    found = records((1, 900.0), (5, 0.1), (8, -1e-9), (40, 1e-12), (6, 0.2))
    assert error_against_time.front(found) == [0, 1, 2]
    assert error_against_time.front(records((1, None), (5, 0.1), (8, 0.1))) == [1]


@pytest.mark.parametrize(
    ("points", "title"),
    [
        ([(1, 900.0), (5, 0.1), (8, 0.0)], "nothing here is faster and nearer"),
        ([(1, 900.0), (9, 0.1), (8, 0.0)], "Gram eigh, float64 is faster and nearer"),
        ([(1, None), (9, None), (8, None)], "the excess undefined"),
    ],
)
def test_the_title_says_whether_the_network_is_beaten(points, title, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, path, **_: (drawn.append(figure), open(path, "wb").close()),
    )
    error_against_time.pareto(tmp_path / "p.png", records(*points), "footer")
    assert title in " ".join(drawn[0].get_suptitle().split())
    words = [text.get_text() for text in drawn[0].axes[0].texts]
    for label in ("PCA, one basis", "network MLP", "Gram eigh, float64"):
        assert sum(word.startswith(label) for word in words) == 1
    assert sum("undefined" in w and "rounding" not in w for w in words) == 3 * (not points[0][1])
