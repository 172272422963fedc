"""Training runs on the small real cache (T = 16, D = 1536), in this process and as a user would."""

import json
import os
import signal

import pytest
import torch
from tiny import steep_tokens

import train_real_data
from common import arguments
from lowrank_tokens.cache_writer import write_cache
from lowrank_tokens.errors import optimum
from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real
from svd_baseline import evaluate, fit_pca, pca
from training.checkpoint import load_checkpoint, load_model, save_checkpoint
from training.state import TrainState

SMALL = ["--rank", "4", "--hidden_dim", "16", "--batch_size", "8", "--lr", "1e-3"]
ALLOCATOR = [
    "--use_rank_allocator",
    "--allocator_init_warmup",
    "4",
    "--allocator_final_warmup",
    "5",
    "--allocator_mask_interval",
    "2",
    "--allocator_keep_ratio",
    "0.5",
]
RUNS = {
    "ResMLP": ["--refine_steps", "1", "--oversample", "2"],
    "MLP": ["--factors", "direct"],
    "AdaLoRA": ["--factors", "direct", "--allocator_importance", "sensitivity", *ALLOCATOR],
}


def flags(tmp_path, cache, *more):
    files = {"--cache_dir": cache, "--results_dir": tmp_path / "results", "--log_dir": tmp_path}
    return [str(word) for pair in files.items() for word in pair] + SMALL + [str(m) for m in more]


def train(tmp_path, cache, *more):
    args = arguments.parse(train_real_data.get_args_parser(), flags(tmp_path, cache, *more))
    return train_real_data.main(args)


def interrupt_after(monkeypatch, step):
    """Send SIGTERM to this process in the middle of optimiser step number `step`."""
    original = train_real_data.train_step

    def train_step(run, *batch):
        if run.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, *batch)

    monkeypatch.setattr(train_real_data, "train_step", train_step)


def equal(a, b):
    """Say whether two checkpoints are the same to the last bit, timings aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        timing = ("seconds", "samples_per_s")
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k not in timing)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("arch", RUNS)
def test_resume_last_equals_the_unbroken_run_bit_for_bit(arch, tiny_cache, tmp_path, monkeypatch):
    options = ["--arch", arch, "--epochs", "4", "--dropout", "0.2", *RUNS[arch]]
    assert train(tmp_path / "whole", tiny_cache, *options) == 0
    # interrupted in the middle of the second epoch, again at the end of the third
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert train(tmp_path / "parts", tiny_cache, *options) == 128 + signal.SIGTERM
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        options = ["--arch", arch, "--resume", "last"]
        assert train(tmp_path / "parts", tiny_cache, *options) == 128 + signal.SIGTERM
    torch.rand(7)  # the generator's state comes from the checkpoint
    assert train(tmp_path / "parts", tiny_cache, *options) == 0
    for name in ("last_model.pt", "best_model.pt"):
        whole, parts = (
            load_checkpoint(tmp_path / run / "results" / arch / name) for run in ("whole", "parts")
        )
        for key in ("model", "optimizer", "scheduler", "allocator", "rng", "progress", "config"):
            assert equal(whole[key], parts[key]), (name, key)
    histories = [
        json.loads((tmp_path / run / "results" / arch / "history.json").read_text())
        for run in ("whole", "parts")
    ]
    assert equal(*histories) and len(histories[0]) == 5


def test_a_run_goes_on_with_another_batch_size_and_its_order_of_images(
    tiny_cache, tmp_path, monkeypatch, capsys
):
    options = ["--epochs", "3", *RUNS["ResMLP"]]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)  # in the middle of the second epoch, after 16 of its 24 images
        assert train(tmp_path, tiny_cache, *options) == 128 + signal.SIGTERM
    path = tmp_path / "results" / "ResMLP" / "last_model.pt"
    assert load_checkpoint(path)["progress"]["batches_done"] == 2
    with pytest.raises(InputError, match="after 16 images, which is no multiple of 5"):
        train(tmp_path, tiny_cache, "--resume", "last", "--batch_size", "5")
    steps, original = [], train_real_data.train_step

    def train_step(run, batch):
        steps.append(batch.rows.tolist())
        return original(run, batch)

    monkeypatch.setattr(train_real_data, "train_step", train_step)
    capsys.readouterr()
    assert train(tmp_path, tiny_cache, "--resume", "last", "--batch_size", "4") == 0
    assert "4 images a step instead of 8" in capsys.readouterr().out
    assert [len(rows) for rows in steps] == [4] * (2 + 6)
    dataset = RealQwenVLDataset(tiny_cache)
    loader = create_data_loaders_real(dataset, 8).train
    for epoch, rows in ((2, steps[:2]), (3, steps[2:])):
        loader.set_epoch(epoch)
        order = sum((share.rows for share in loader.sampler.shares()), [])
        assert sum(rows, []) == order[-4 * len(rows) :]
    assert load_checkpoint(path)["args"]["batch_size"] == 4


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_cache, tmp_path):
    histories = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, tiny_cache, "--epochs", "1", "--seed", seed)
        path = tmp_path / name / "results" / "ResMLP" / "history.json"
        histories.append(json.loads(path.read_text()))
    assert equal(histories[0], histories[1])
    assert not equal(histories[0], histories[2])


def test_resume_from_the_best_model_adds_epochs_and_a_typed_learning_rate_wins(
    tiny_cache, tmp_path, capsys
):
    train(tmp_path, tiny_cache, "--epochs", "2")
    folder = tmp_path / "results" / "ResMLP"
    best = load_checkpoint(folder / "best_model.pt")["progress"]["best_epoch"]
    train(tmp_path, tiny_cache, "--resume", "--epochs", "3", "--lr", "5e-4")
    history = json.loads((folder / "history.json").read_text())
    assert [record["epoch"] for record in history] == list(range(best + 4))
    assert history[-1]["lr"] == 5e-4
    assert "lr 5.000e-04" in capsys.readouterr().out


def test_a_run_resumed_from_an_early_best_epoch_keeps_a_copy_of_the_later_ones(
    tiny_cache, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:  # every epoch is worse than the one before
        patch.setattr(TrainState, "selection_score", lambda run, record: record["epoch"])
        train(tmp_path, tiny_cache, "--epochs", "2")
    folder = tmp_path / "results" / "ResMLP"
    before = {n: (folder / n).read_bytes() for n in ("history.json", "last_model.pt")}
    assert load_checkpoint(folder / "best_model.pt")["progress"]["best_epoch"] == 0
    train(tmp_path, tiny_cache, "--resume", "--epochs", "1")
    (copy,) = folder.glob("previous-*")
    assert {n: (copy / n).read_bytes() for n in before} == before
    assert f"the history after epoch 0 is kept in {copy}" in capsys.readouterr().out
    assert len(json.loads((folder / "history.json").read_text())) == 2


def test_a_patience_typed_with_resume_is_the_schedulers_too(tiny_cache, tmp_path):
    train(tmp_path, tiny_cache, "--epochs", "1", "--patience", "4")
    path = tmp_path / "results" / "ResMLP" / "last_model.pt"
    assert load_checkpoint(path)["scheduler"]["patience"] == 1
    train(tmp_path, tiny_cache, "--resume", "--epochs", "1", "--patience", "20")
    assert load_checkpoint(path)["scheduler"]["patience"] == 9


def test_a_finished_run_is_not_resumed_and_a_contradicting_flag_is_named(tiny_cache, tmp_path):
    train(tmp_path, tiny_cache, "--epochs", "1")
    with pytest.raises(InputError, match="finished run: type --resume last --epochs N to add N"):
        train(tmp_path, tiny_cache, "--resume", "last")
    with pytest.raises(InputError, match="--weight_decay 0.5 differs from the 1e-05"):
        train(tmp_path, tiny_cache, "--resume", "--weight_decay", "0.5")


def test_epochs_added_to_a_finished_run_end_in_the_unbroken_run_bit_for_bit(tiny_cache, tmp_path):
    train(tmp_path / "whole", tiny_cache, "--epochs", "3")
    train(tmp_path / "parts", tiny_cache, "--epochs", "1")
    train(tmp_path / "parts", tiny_cache, "--resume", "last", "--epochs", "2")
    whole, parts = (
        load_checkpoint(tmp_path / name / "results" / "ResMLP" / "last_model.pt")
        for name in ("whole", "parts")
    )
    for key in ("model", "optimizer", "scheduler", "rng", "progress"):
        assert equal(whole[key], parts[key]), key
    with pytest.raises(InputError, match="finished run"):  # as the whole one is
        train(tmp_path / "parts", tiny_cache, "--resume", "last")


def test_a_run_is_not_resumed_on_other_images_of_the_same_groups(tiny_cache, tmp_path):
    train(tmp_path, tiny_cache, "--epochs", "1")
    path = tmp_path / "results" / "ResMLP" / "last_model.pt"
    state = load_checkpoint(path)
    known = state["images"]["image_sha256"]
    # as if the cache had been extracted again from other files under the same group names
    changed = [value[::-1] for value in known[:2]] + known[2:]
    images = state["images"] | {"image_sha256": sorted(changed)}
    save_checkpoint(path, state | {"images": images})
    with pytest.raises(InputError, match="was trained on other images: 2 of its"):
        train(tmp_path, tiny_cache, "--resume", "last", "--epochs", "1")


def test_a_run_on_tokens_without_images_is_not_resumed_on_others_of_the_same_groups(tmp_path):
    """No image, no hash: only the groups' names were compared, and the run went on."""
    for name, seed in (("cache", 0), ("same", 0), ("other", 1)):
        tokens = [{"tokens": one, "grid": (4, 4)} for one in steep_tokens(12, seed=seed)]
        groups = [f"group {i}" for i in range(12)]
        write_cache(tmp_path / name, tokens, encoder_id="my-vit", groups=groups)
    train(tmp_path, tmp_path / "cache", "--epochs", "1")
    path = tmp_path / "results" / "ResMLP" / "last_model.pt"
    load_checkpoint(path, RealQwenVLDataset(tmp_path / "same"))
    with pytest.raises(InputError, match="was trained on a cache with content_sha256 = "):
        train(tmp_path, tmp_path / "other", "--resume", "last", "--epochs", "1")


def test_flags_that_say_what_the_run_already_has_may_be_typed_again(tiny_cache, tmp_path):
    train(tmp_path, tiny_cache, "--epochs", "1")
    train(
        tmp_path,
        tiny_cache,
        "--resume",
        "--epochs",
        "1",
        "--refine_steps",
        "1",
        "--oversample",
        "12",
        "--num_blocks",
        "1",
        "--factors",
        "projected",
    )


def test_a_twice_interrupted_run_still_knows_its_epochs(tiny_cache, tmp_path, monkeypatch):
    for step, more in ((2, ["--epochs", "3"]), (5, ["--resume", "last"])):
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            train(tmp_path, tiny_cache, *more)
    with pytest.raises(InputError, match="unfinished run of 3 epochs"):
        train(tmp_path, tiny_cache, "--resume", "last", "--epochs", "20")
    assert train(tmp_path, tiny_cache, "--resume", "last", "--epochs", "3") == 0
    history = json.loads((tmp_path / "results" / "ResMLP" / "history.json").read_text())
    assert history[-1]["epoch"] == 3


@pytest.mark.slow
def test_a_run_cut_off_before_its_test_numbers_gets_them_by_resuming(tiny_cache, tmp_path):
    train(tmp_path, tiny_cache, "--epochs", "1")
    results = tmp_path / "results" / "ResMLP" / "test_results.json"
    before = results.read_text()
    results.unlink()
    assert train(tmp_path, tiny_cache, "--resume", "last") == 0
    assert results.read_text() == before
    # numbers of an earlier, shorter run do not count as this run's
    train(tmp_path, tiny_cache, "--resume", "--epochs", "3")
    after = results.read_text()
    results.write_text(before)
    assert train(tmp_path, tiny_cache, "--resume", "last") == 0
    assert results.read_text() == after != before


def test_a_run_that_fails_before_its_first_checkpoint_leaves_the_old_results(
    tiny_cache, tmp_path, monkeypatch
):
    train(tmp_path, tiny_cache, "--epochs", "1")
    with monkeypatch.context() as patch:
        patch.setattr(train_real_data, "train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, tiny_cache, "--epochs", "1")
    folder = tmp_path / "results" / "ResMLP"
    assert (folder / "best_model.pt").exists() and not list(folder.glob("previous-*"))


def test_a_run_whose_validation_is_not_finite_stops_in_words(tiny_cache, tmp_path):
    with pytest.raises(InputError, match="not finite.*lower --lr"):
        train(tmp_path, tiny_cache, "--epochs", "3", "--lr", "1e38", "--factors", "direct")


def test_bf16_branches_are_rebuilt_as_bf16(tiny_cache, tmp_path):
    train(tmp_path, tiny_cache, "--epochs", "1", "--precision", "bf16", "--factors", "direct")
    folder = tmp_path / "results" / "ResMLP"
    model, state = load_model(folder / "best_model.pt", torch.device("cpu"))
    assert model.config.precision == "bf16"
    dataset = RealQwenVLDataset(tiny_cache)
    validation = create_data_loaders_real(dataset, 8).val
    error = evaluate(lambda x: model(x), validation)["rel_error"].mean()
    history = json.loads((folder / "history.json").read_text())
    best = history[state["progress"]["best_epoch"]]
    assert best["val_rel_error"] == pytest.approx(float(error), rel=1e-6)


def test_a_fresh_run_moves_old_results_aside(tiny_cache, tmp_path, capsys):
    train(tmp_path, tiny_cache, "--epochs", "1")
    train(tmp_path, tiny_cache, "--epochs", "1")
    (old,) = (tmp_path / "results" / "ResMLP").glob("previous-*")
    assert (old / "best_model.pt").exists()
    assert f"moved to {old}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_direct_network_starts_as_pca_and_training_lowers_its_validation_error(
    tiny_cache, tmp_path
):
    loaders = create_data_loaders_real(RealQwenVLDataset(tiny_cache), 8)
    axes = fit_pca(batch.x for batch in loaders.train)
    start = evaluate(lambda x: pca(x, 4, axes), loaders.val)["rel_error"].mean()
    for arch in RUNS:
        more = ["--arch", arch, "--factors", "direct", "--epochs", "15"]
        train(tmp_path, tiny_cache, *more)
        history = json.loads((tmp_path / "results" / arch / "history.json").read_text())
        assert history[0]["val_rel_error"] == pytest.approx(float(start), rel=1e-4), arch
        assert history[-1]["val_rel_error"] < 0.99 * history[0]["val_rel_error"], arch


def test_the_final_numbers_come_from_the_best_checkpoint_and_not_from_the_last(
    tiny_cache, tmp_path
):
    train(tmp_path, tiny_cache, "--epochs", "3", "--factors", "direct")
    folder = tmp_path / "results" / "ResMLP"
    dataset = RealQwenVLDataset(tiny_cache)
    model, state = load_model(folder / "best_model.pt", torch.device("cpu"), dataset)
    history = json.loads((folder / "history.json").read_text())
    assert state["progress"]["best_epoch"] == min(history, key=lambda r: r["val_mse"])["epoch"]
    test = create_data_loaders_real(dataset, 8).test
    expected = evaluate(lambda x: model(x, 4), test)["rel_error"].mean()
    results = json.loads((folder / "test_results.json").read_text())
    assert results["ranks"]["4"]["rel_error"]["mean"] == pytest.approx(float(expected), rel=1e-6)
    assert results["n_images"] == len(dataset.split.test)


def test_where_training_only_makes_it_worse_the_untrained_model_is_the_best_one(
    tiny_cache, tmp_path, capsys
):
    more = ["--epochs", "1", "--oversample", "0", "--lr", "0.5"]
    train(tmp_path, tiny_cache, *more)
    folder = tmp_path / "results" / "ResMLP"
    history = json.loads((folder / "history.json").read_text())
    assert history[0]["val_mse"] < history[1]["val_mse"]
    best = load_checkpoint(folder / "best_model.pt")
    assert best["progress"]["best_epoch"] == best["progress"]["step"] == 0
    assert json.loads((folder / "test_results.json").read_text())["best_epoch"] == 0
    # going on from it is training from the start, as it was the first time
    capsys.readouterr()
    train(tmp_path, tiny_cache, "--resume", "--epochs", "1", "--lr", "0.5")
    said = capsys.readouterr().out
    assert "epoch 0 is the best: training has not helped" in said
    assert "--resume last --epochs 1 to go on from the last epoch" in said
    again = json.loads((folder / "history.json").read_text())
    assert equal(history, again)


def test_validation_numbers_are_whole_matrix_errors_of_the_validation_images(tiny_cache, tmp_path):
    train(tmp_path, tiny_cache, "--epochs", "1")
    history = json.loads((tmp_path / "results" / "ResMLP" / "history.json").read_text())
    dataset = RealQwenVLDataset(tiny_cache)
    sigma = dataset.singular_values[dataset.split.val]
    floor = (optimum(sigma, 4).square() * sigma.square().sum(-1)).mean() / (16 * 1536)
    assert history[-1]["val_optimum_mse"] == pytest.approx(float(floor), rel=1e-9)
    assert history[-1]["val_mse"] >= float(floor)
    terms = [v for k, v in history[-1].items() if k.startswith("loss_")]
    assert history[-1]["train_loss"] == pytest.approx(sum(terms))


def test_early_stopping_ends_after_patience_epochs_without_improvement(tiny_cache, tmp_path):
    train(
        tmp_path,
        tiny_cache,
        "--epochs",
        "60",
        "--patience",
        "2",
        "--lr",
        "0.3",
        "--factors",
        "direct",
    )
    state = load_checkpoint(tmp_path / "results" / "ResMLP" / "last_model.pt")["progress"]
    assert state["finished"] and state["bad_epochs"] == 2
    assert state["epoch"] - 1 == state["best_epoch"] + 2 < 60


def test_stopping_and_best_wait_until_the_allocator_s_rank_is_final(tiny_cache, tmp_path):
    more = ["--arch", "AdaLoRA", "--epochs", "5", "--patience", "1", *ALLOCATOR]
    train(tmp_path, tiny_cache, *more)
    folder = tmp_path / "results" / "AdaLoRA"
    history = json.loads((folder / "history.json").read_text())
    assert [r["effective_rank"] for r in history][0] == 4 and history[-1]["effective_rank"] == 2
    best = load_checkpoint(folder / "best_model.pt")
    assert best["progress"]["best_epoch"] >= 3  # step 9 is in the third epoch
    assert int(best["model"]["rank_mask"].sum()) == 2
    assert json.loads((folder / "test_results.json").read_text())["effective_rank"] == 2


def test_a_non_finite_step_changes_no_weight_and_stops_the_run(tiny_cache, tmp_path, monkeypatch):
    train(tmp_path, tiny_cache, "--epochs", "1")
    kept = load_checkpoint(tmp_path / "results" / "ResMLP" / "best_model.pt")
    original = train_real_data.train_step
    seen = []

    def train_step(run, batch):
        before = [p.clone() for p in run.model.parameters()]
        broken = batch._replace(x=batch.x * torch.nan)
        result = original(run, broken if run.step == 4 else batch)
        same = all(map(torch.equal, before, run.model.parameters()))
        seen.append((run.step, same))
        return result

    monkeypatch.setattr(train_real_data, "train_step", train_step)
    with pytest.raises(InputError, match="not finite in 1 step.*best_model.pt is kept"):
        train(tmp_path, tiny_cache, "--resume", "--epochs", "2")
    assert [step for step, same in seen if same] == [5]
    after = load_checkpoint(tmp_path / "results" / "ResMLP" / "best_model.pt")
    assert equal(kept["model"], after["model"])


def test_each_weight_of_the_loss_changes_what_is_learned(tiny_cache, tmp_path):
    names = ("B", "ortho", "act")
    unweighted = {f"--lambda_{name}": "0" for name in names}

    def learned(folder, **weights):
        chosen = unweighted | {f"--lambda_{name}": weight for name, weight in weights.items()}
        words = [word for pair in chosen.items() for word in pair]
        train(
            folder, tiny_cache, "--epochs", "1", "--arch", "AdaLoRA", "--factors", "direct", *words
        )
        last = json.loads((folder / "results" / "AdaLoRA" / "history.json").read_text())[-1]
        assert {name for name in names if last[f"loss_{name}"] > 0} == set(weights)
        return load_checkpoint(folder / "results" / "AdaLoRA" / "last_model.pt")["model"]

    plain = learned(tmp_path / "plain")
    for name in names:
        assert not equal(plain, learned(tmp_path / name, **{name: "0.5"}))


def test_logs_hold_configuration_every_epoch_and_the_summary(tiny_cache, tmp_path):
    train(tmp_path, tiny_cache, "--epochs", "2", "--tensorboard")
    (folder,) = tmp_path.glob("logs_*")
    config = json.loads((folder / "config.json").read_text())
    assert config["rank"] == 4 and config["environment"]["torch"] == torch.__version__
    log = (folder / "training.log").read_text()
    assert "lr 1.00e-03" in log and "epoch    2" in log and "DEMO data" in log
    summary = json.loads((folder / "final_summary.json").read_text())
    assert {"best_epoch", "ranks", "wall_seconds", "samples_per_s", "environment"} <= set(summary)
    assert list(folder.glob("events.out.tfevents*"))


def test_a_checkpoint_runs_no_code_and_a_damaged_one_is_refused(tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "best_model.pt"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)
    torch.save({"payload": Payload()}, path)
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()
