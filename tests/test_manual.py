"""The manual's path for every architecture and way of training: train, resume, compare, draw."""

import json

import pytest
from PIL import Image

TRAIN = "--epochs 2 --lr 1e-3 --rank 4 --hidden_dim 16 --batch_size 8".split()
ALLOCATOR = (
    "--dropout 0.1 --use_rank_allocator --allocator_init_warmup 1 --allocator_final_warmup 2"
    " --allocator_mask_interval 1 --allocator_keep_ratio 0.5"
).split()
WAYS = {
    "frobenius": ["--oversample", "2"],
    "direct": ["--factors", "direct"],
    "saliency": ["--oversample", "2", "--task_head", "saliency"],
}


@pytest.mark.slow
@pytest.mark.painted
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ["ResMLP", "MLP", "AdaLoRA"])
def test_the_manuals_commands_train_resume_compare_and_draw(
    arch, way, tiny_cache, script, tmp_path
):
    where = ["--arch", arch, "--cache_dir", tiny_cache, "--results_dir", "results"]
    allocator = arch == "AdaLoRA" and way != "saliency"  # a task's network keeps every rank
    more = WAYS[way] + (ALLOCATOR if allocator else [])
    done = script("train_real_data.py", *where, *TRAIN, *more)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "results" / arch
    best_epoch = json.loads((results / "test_results.json").read_text())["best_epoch"]
    done = script("train_real_data.py", *where, "--resume", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "going on with the run" in done.stdout
    for command in ("compare_svd_nn.py", "visualize_svd_nn.py"):
        done = script(command, *where)
        assert done.returncode == 0, done.stderr

    epochs = [entry["epoch"] for entry in json.loads((results / "history.json").read_text())]
    assert epochs == list(range(best_epoch + 2))  # one was added to the best one
    found = json.loads((results / "svd_nn_comparison.json").read_text())
    assert found["rank"] == (2 if allocator else 4)
    for methods in found["ranks"].values():
        svd = methods["svd"]["rel_error"]["mean"]
        assert methods["network"]["rel_error"]["mean"] >= svd * (1 - 1e-6)
    assert (found["task"] is not None) == (way == "saliency")
    figures = list(results.glob("*.png"))
    assert len(figures) == 9
    for figure in figures:
        with Image.open(figure) as image:
            assert image.format == "PNG" and min(image.size) > 300
