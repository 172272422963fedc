import json

import pytest
from PIL import Image

from experiments.ablate import SKETCHES, gains_at_equal_time, runs_so_far

FLAGS = "--rank 4 --refine_steps 0 1 --oversample 2 --seeds 1 --epochs 1 --repeats 1 --device cpu"


@pytest.fixture
def ablate(tiny_cache, tmp_path, script):
    """Run experiments.ablate into `tmp_path`."""

    def run(*more):
        return script(
            "experiments.ablate",
            "--cache_dir",
            tiny_cache,
            "--results_dir",
            tmp_path,
            *FLAGS.split(),
            *more,
        )

    return run


def test_every_sketch_is_measured_with_start_shifts_and_learned_ones(ablate, tmp_path):
    done = ablate()
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ablation_rank4.json").read_text())
    kinds = {(r["sketch"], r["steps"], r["shifts"]) for r in found["records"]}
    expected = {(s, 1, shifts) for s in SKETCHES for shifts in ("start", "learned")}
    assert kinds == expected | {(s, 0, "start") for s in SKETCHES}
    for record in found["records"]:
        assert record["excess_mean"] > -1e-3 and record["ms"] > 0
        assert record["excess_interval"] is None  # the tiny cache has two test groups
    assert "exact, by the float64 Gram matrix" in done.stdout
    with Image.open(tmp_path / "ablation_rank4.png") as image:
        assert min(image.size) > 300


def test_an_interrupted_ablation_goes_on_with_what_is_missing(ablate, tmp_path):
    few = ["--sketches", "random", "linear"]
    assert ablate(*few).returncode == 0
    path = tmp_path / "ablation_rank4.json"
    whole = json.loads(path.read_text())["runs"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "runs": whole[:4]}))
    assert ablate(*few).returncode == 0
    assert json.loads(path.read_text())["runs"] == whole
    done = ablate(*few, "--lr", "0.5")
    assert done.returncode == 2 and "lr = 0.001, now it is 0.5" in done.stderr
    assert json.loads(path.read_text())["runs"] == whole


def record(sketch, ms, on_val, on_test, images):
    """A run's mean excess of validation and of test images, alike for each."""
    return {
        **{"sketch": sketch, "shifts": "start", "steps": 0, "oversample": 0, "ms": ms},
        **{"val_excess_mean": on_val, "excess_mean": on_test, "per_image": [on_test] * images},
    }


def test_a_gain_is_against_the_best_untrained_sketch_that_takes_no_longer():
    groups = [str(i) for i in range(8)]
    records = [
        record("random", 1, 4.0, 4.0, 8),
        record("columns", 2, 2.0, 2.0, 8),
        record("random", 9, 0.1, 0.1, 8),
        record("linear", 2, 1.0, 1.0, 8),
        record("MLP", 0.5, 0.5, 0.5, 8),
    ]
    (gain,) = gains_at_equal_time(records, groups)  # nothing untrained is as fast as the MLP
    assert gain["sketch"] == "linear" and gain["random"]["sketch"] == "columns"
    assert gain["gain_pct"] == pytest.approx(50)
    assert gain["gain_interval"] == pytest.approx([50, 50])


def test_the_pair_that_is_quoted_is_picked_on_validation_images_and_measured_on_test_images():
    records = [
        record("random", 1.0, 3.0, 1.5, 4),
        record("columns", 1.0, 2.0, 2.0, 4),
        record("linear", 1.0, 1.5, 0.1, 4),
        record("MLP", 1.0, 1.0, 1.2, 4),
    ]
    best, other = gains_at_equal_time(records, list("abcd"))
    # on test images the linear sketch, and the random one as its rival, would have looked best
    assert best["sketch"] == "MLP" and best["random"]["sketch"] == "columns"
    assert (best["val_gain_pct"], best["gain_pct"]) == pytest.approx((50, 40))
    assert other["sketch"] == "linear" and other["gain_pct"] == pytest.approx(95)


def test_runs_of_an_older_version_without_validation_images_are_made_again(tmp_path):
    runs = [{"excess_pct": [1.0]}, {"excess_pct": [1.0], "val_excess_pct": [1.0]}]
    path = tmp_path / "ablation_rank4.json"
    path.write_text(json.dumps({"trained_with": {"rank": 4}, "runs": runs}))
    assert runs_so_far(path, {"rank": 4}) == runs[1:]
