"""Nothing lost, nothing silent: damaged files, locks, full disks, odd values. Kills: test_kills."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import warnings
from pathlib import Path

import damage
import pytest
import tiny
import torch
from forked import command, limited
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compare_svd_nn
import extract_features
import factorize
import train_real_data
from common import arguments
from lowrank_tokens import files
from lowrank_tokens import shards as shard_folder
from lowrank_tokens.errors import image_metrics
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import load_factors, read_factors_manifest
from lowrank_tokens.files import LOCK_NAME, sole_writer
from lowrank_tokens.linalg import exact_singular_values, normalise
from model import ARCHITECTURES, get_model_by_name
from qwenvl_dataloader import RealQwenVLDataset
from training import final_results
from training.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--rank 2 --hidden_dim 8 --epochs 1 --device cpu".split()


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture
def train(script, tmp_path):
    """Run train_real_data.py on a cache into tmp_path/results."""

    def run(cache, *flags):
        where = ["--cache_dir", cache, "--results_dir", "results", "--log_dir", "log"]
        return script("train_real_data.py", *where, *SMALL, *flags)

    return run


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("cases", [2, slow(30)])
def test_damage_of_any_file_is_refused_or_found_by_verify(cases, made, tmp_path):
    rng = random.Random(cases)
    for name, kind in made.items():
        whole = Path(shutil.copytree(kind.folder, tmp_path / "clean" / kind.folder.name))
        clean = kind.read(whole)
        shutil.rmtree(tmp_path / "clean")
        for _ in range(cases):
            outcome, how = damage.one_case(kind, clean, tmp_path / "copy", rng)
            assert outcome in ("refused", "found by --verify", "harmless"), (name, outcome, how)


def test_a_flipped_bit_of_a_weight_is_found_when_the_checkpoint_is_opened(made, tmp_path):
    source = made["best_model.pt"].folder / "best_model.pt"
    weight = load_checkpoint(source)["model"]["row_net.head.weight"]
    data = bytearray(source.read_bytes())
    data[data.index(weight.numpy().tobytes()) + 2] ^= 1
    path = tmp_path / "best_model.pt"
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged .checksum of"):
        load_checkpoint(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_entry_of_a_manifest_may_be_anything_and_is_opened_or_refused_in_words(made, data):
    kind, read = data.draw(
        st.sampled_from(
            [
                (made["manifest.json"], RealQwenVLDataset),
                (made["factors manifest.json"], read_factors_manifest),
                (made["ragged manifest.json"], load_factors),
            ]
        )
    )
    path = kind.folder / "manifest.json"
    whole = path.read_text()
    value = changed = json.loads(whole)
    for _ in range(data.draw(st.integers(0, 3))):  # down to some entry
        inside = list(value) if isinstance(value, dict) else range(len(value))
        inside = [key for key in inside if isinstance(value[key], dict | list) and value[key]]
        if inside:
            value = value[data.draw(st.sampled_from(inside))]
    key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    if data.draw(st.booleans()):
        value[key] = data.draw(VALUES)
    else:
        del value[key]
    try:
        path.write_text(json.dumps(changed))
        read(kind.folder)
    except InputError:
        pass
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": NaN}', "9" * 5000, '"\\ud800', "\xff", "", "null"]
)
def test_json_that_is_none_is_damage_and_not_a_traceback(text, tmp_path, made):
    cache = Path(shutil.copytree(made["manifest.json"].folder, tmp_path / "cache"))
    (cache / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="manifest.json is damaged"):
        RealQwenVLDataset(cache)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_features_that_became_nan_infinite_or_huge_are_refused_with_their_row(value, tmp_path):
    cache = tiny.write_cache(tmp_path / "cache", tiny.steep_tokens(5))
    shard = cache / "features-00000.safetensors"
    features = RealQwenVLDataset(cache)[list(range(5))]
    features[3, 1, 7] = value
    files.save_tensors(shard, {"features": features.flatten(0, 1)})
    dataset = RealQwenVLDataset(cache)
    assert dataset[[2, 4]].isfinite().all()
    for read in (lambda: dataset[[0, 3]], lambda: dataset.keep_resident(torch.device("cpu"))):
        with pytest.raises(InputError, match="row 3 are not finite.*--verify"):
            read()
    assert list(dataset.verify()) == ["features-00000.safetensors"]


# ----------------------------------------------------------------------------------------- locks


@pytest.fixture
def holder(tmp_path):
    """The id of another process, that holds the lock of tmp_path/folder."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with sole_writer(tmp_path / "folder", "--out"):
            os.write(write, b"held")
            signal.pause()
        os._exit(0)
    assert os.read(read, 4) == b"held"
    yield pid
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_writer_is_refused_with_process_and_host_until_the_first_has_ended(
    holder, tmp_path
):
    folder = tmp_path / "folder"
    with pytest.raises(InputError, match=f"--out: .*process {holder} on {os.uname().nodename}"):
        with sole_writer(folder, "--out"):
            pass
    os.kill(holder, signal.SIGKILL)  # no chance to clean up
    os.waitpid(holder, 0)
    assert (folder / LOCK_NAME).exists()
    with sole_writer(folder, "--out"):
        assert str(os.getpid()) in (folder / LOCK_NAME).read_text()
    assert list(folder.iterdir()) == []


def test_every_script_that_writes_a_folder_piece_by_piece_locks_it(
    made, tmp_path, script, monkeypatch
):
    cache, results = made["manifest.json"].folder, made["best_model.pt"].folder.parent
    data = made["data set *.parquet"].folder
    monkeypatch.setattr(extract_features, "load_encoder", lambda *_, **__: tiny.TinyEncoder())
    where = ["--cache_dir", cache, "--results_dir"]
    for locked, argv in (
        ("mine/ResMLP", ["train_real_data.py", *where, "mine", *SMALL]),
        ("new", ["extract_features.py", "--dataset_dir", data, "--cache_dir", "new"]),
        ("out", ["factorize.py", *where, results, "--out", "out"]),
    ):
        with sole_writer(tmp_path / locked, "--flag"):
            done = script(*argv)
            assert done.returncode == 2 and f"process {os.getpid()} on" in done.stderr
            assert [path.name for path in (tmp_path / locked).iterdir()] == [LOCK_NAME]
        assert script(*argv).returncode == 0
        assert not (tmp_path / locked / LOCK_NAME).exists()


def test_readers_are_not_kept_out(made, tmp_path, script):
    results = Path(shutil.copytree(made["best_model.pt"].folder.parent, tmp_path / "results"))
    cache = Path(shutil.copytree(made["manifest.json"].folder, tmp_path / "cache"))
    where = ["--cache_dir", cache, "--results_dir", results]
    with sole_writer(results / "ResMLP", "--results_dir"), sole_writer(cache, "--cache_dir"):
        done = script("factorize.py", *where, "--rank", 2)
        assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- kills, full disks


@pytest.mark.slow
def test_a_run_killed_while_it_writes_its_figures_is_not_taken_for_a_finished_one(
    train, tmp_path, monkeypatch
):
    cache = tiny.write_cache(tmp_path / "cache", tiny.steep_tokens(12))
    with monkeypatch.context() as patch:
        patch.setattr(final_results.token_grid, "error_heatmap", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(cache)
    folder = tmp_path / "results" / "ResMLP"
    (folder / "history.json").write_text("[]")  # killed before it, too
    where = ["--cache_dir", cache, "--log_dir", "log", "--resume", "last"]
    done = run_train(where)
    assert done == 0 and (folder / "error_heatmap.png").exists()
    assert len(json.loads((folder / "history.json").read_text())) == 2
    with pytest.raises(InputError, match="finished run"):
        run_train(where)
    # added epochs take the test numbers away until they are made again
    with monkeypatch.context() as patch:
        patch.setattr(train_real_data, "evaluate_best_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_train([*where[:4], "--resume", "--epochs", "1"])
    assert not (folder / "test_results.json").exists()


def run_train(argv):
    args = arguments.parse(train_real_data.get_args_parser(), [str(a) for a in argv])
    return train_real_data.main(args)


@pytest.mark.slow
def test_old_results_that_were_moved_half_way_are_not_resumed(train, tmp_path, monkeypatch):
    cache = tiny.write_cache(tmp_path / "cache", tiny.steep_tokens(12))
    assert train(cache).returncode == 0
    moved = []

    def rename(path, target, original=Path.rename):
        moved.append(path.name)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        assert train(cache).returncode == 130
    assert moved[0] == "last_model.pt"
    done = train(cache, "--resume", "last")
    assert done.returncode == 2 and "last_model.pt does not exist" in done.stderr
    assert train(cache).returncode == 0
    assert len(list((tmp_path / "results" / "ResMLP").rglob("best_model.pt"))) == 2


def test_an_overwrite_that_was_cut_off_leaves_no_part_without_its_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 4)
    tokens = tiny.steep_tokens(10)

    def begin(**options):
        writer = tiny.begin_cache(tmp_path, tokens, **options)
        tiny.write_shards(writer, tokens, leave=1)
        return writer

    original = Path.unlink
    for removals in range(5):  # of five files
        begin(overwrite=True)
        left = [removals]

        def unlink(path, missing_ok=False, left=left):
            left[0] -= path.exists()
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", unlink)
            begin(overwrite=True)
        try:
            writer = begin()
            tiny.write_shards(writer, tokens)
            writer.finish()
            assert RealQwenVLDataset(tmp_path).verify() == {}
            assert torch.equal(RealQwenVLDataset(tmp_path)[range(10)], tokens.bfloat16())
        except InputError as error:
            assert "start again and overwrite the folder" in str(error)


@pytest.mark.painted
@pytest.mark.parametrize("size", [3000, *[slow(n) for n in (300, 5_000, 20_000, 45_000)]])
def test_a_disk_that_is_full_is_one_line_and_leaves_every_file_as_it_was(
    size, made, tmp_path, monkeypatch
):
    """Files that may not grow beyond `size` bytes stand for the full disk."""
    monkeypatch.setattr(extract_features, "load_encoder", lambda *_, **__: tiny.TinyEncoder())
    place = tmp_path / "place"
    shutil.copytree(made["best_model.pt"].folder.parent, place / "results")
    shutil.copytree(made["manifest.json"].folder, place / "cache")
    where = ["--cache_dir", place / "cache", "--results_dir", place / "results"]
    logs, images = ["--log_dir", place / "log"], made["data set *.parquet"].folder
    for script, *flags in (
        (train_real_data, *where, *logs, "--resume", "--epochs", 1),
        (compare_svd_nn, *where),
        (factorize, *where, "--out", place / "factors"),
        (extract_features, "--dataset_dir", images, "--cache_dir", place / "new_cache"),
        (train_real_data, *where, *logs, *SMALL),  # moves the old results aside
    ):
        before = contents(place)
        outcome = limited(command(script, *flags), size)
        left = contents(place)
        assert not [path for path in left if ".tmp" in path.name or path.name == LOCK_NAME]
        if outcome.status != 0:
            assert outcome.status == 2 and "Traceback" not in outcome.output, outcome
            errors = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, outcome
            assert "File too large" in errors[0] or "(os error 27)" in errors[0]
        for path, data in before.items() - left.items():  # moved aside, or training has gone on
            assert data in left.values() or "--resume" in flags, path
        for path in place.rglob("*.pt"):
            load_checkpoint(path)


def contents(folder):
    """Return the bytes of each file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_write_that_fails_names_the_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "best_model.pt"
    state = {"x": torch.arange(3)}
    save_checkpoint(path, state)
    whole = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
        with pytest.raises(OSError) as error:
            save_checkpoint(path, {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------ bad values


def odd_tokens():
    """Name → tokens [n, T, D] that are legal and odd."""
    x = tiny.steep_tokens(12)
    some, zeros = x.clone(), x.clone()
    some[:, 2:14] = 5.0
    zeros[:7:2] = 0
    few = torch.randn(12, 16, 3) @ torch.randn(12, 3, 48)
    return {
        "all zero": 0 * x,
        "constant tokens": torch.arange(16.0).view(1, 16, 1).expand(12, 16, 48),
        "some constant tokens": some,
        "some images zero": zeros,
        "one token, repeated": x[:, :1].expand(12, 16, 48),
        "fewer independent tokens than r": few,
        "values of 1e4": 1e4 * x / x.abs().max(),
        "one token": torch.randn(12, 1, 48),
        "one feature": torch.randn(12, 16, 1),
        "more tokens than features": torch.randn(12, 48, 16),
        "one image, repeated": x[:1].expand(12, 16, 48),
        "three images": x[:3],
    }


@pytest.mark.parametrize("name", odd_tokens())
@pytest.mark.parametrize("options", [{}, {"factors": "direct"}, {"full": True}])
def test_odd_tokens_give_finite_losses_gradients_and_honest_excess(name, options):
    torch.manual_seed(0)
    x = normalise(odd_tokens()[name].bfloat16())[0]
    sigma = exact_singular_values(x)
    limit = min(x.shape[1:])
    rank = limit if options.pop("full", False) else min(5, limit)
    for arch in ARCHITECTURES:
        shape = {"input_dim": x.shape[2], "num_tokens": x.shape[1], "rank": rank}
        model = get_model_by_name(arch, **shape, hidden_dim=8, **options)
        terms = model.loss_terms(x, sigma)
        assert all(term.isfinite().all() for term in terms if term is not None)
        (terms.reconstruction + terms.B + terms.ortho + terms.act + terms.lora_ortho).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients)
        with torch.no_grad():
            metrics = image_metrics(x, *model(x), sigma)
        assert metrics["rel_error"].isfinite().all()
        excess = metrics["excess_pct"]
        assert (excess.isnan() | (excess > -1e-3)).all() and not excess.isinf().any()
        if not options:
            assert (metrics["rel_error"] < 1.01).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all zero", "some images zero", "one token"])
def test_odd_tokens_go_through_every_script(name, tmp_path, script, train):
    tokens = odd_tokens()[name]
    cache = tiny.write_cache(tmp_path / "cache", tokens)
    where = ["--cache_dir", cache, "--results_dir", "results"]
    rank = min(5, *tokens.shape[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's, of axes that show nothing but zeros
        done = [
            train(cache, "--rank", rank, "--batch_size", 100),
            script("compare_svd_nn.py", *where),
            script("visualize_svd_nn.py", *where),
            script("factorize.py", *where, "--target_error", 0.99, "--dtype", "int8"),
            script("experiments.benchmark", *where, "--ranks", rank, "--repeats", 1),
            script("experiments.report", "--results_dir", "results"),
        ]
    assert [d.returncode for d in done] == [0] * 6, done
    text = (tmp_path / "results" / "ResMLP" / "svd_nn_comparison.json").read_text()
    methods = json.loads(text)["ranks"][str(rank)]
    for method in methods.values():
        excess = method["excess_pct"]["mean"]
        assert excess is None or excess > -1e-3
    assert load_factors(tmp_path / "factors" / "ResMLP").isfinite().all()


def test_too_few_images_are_refused_before_anything_is_encoded(tmp_path, script):
    data = tiny.write_data_set(tmp_path / "images", [tiny.jpeg(0)])
    done = script("extract_features.py", "--dataset_dir", data, "--cache_dir", "cache")
    assert done.returncode == 2 and "at least 3" in done.stderr
    assert not (tmp_path / "cache").exists()


# --------------------------------------------------------------------------------- reproducible


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["ResMLP", "AdaLoRA"])
def test_the_same_seed_twice_gives_the_same_checkpoints_and_json(arch, tmp_path, script, train):
    cache = tiny.write_cache(tmp_path / "cache", tiny.steep_tokens(12))
    found = []
    for _ in range(2):
        assert train(cache, "--arch", arch, "--dropout", 0.2, "--epochs", 2).returncode == 0
        where = ["--cache_dir", cache, "--results_dir", "results", "--arch", arch]
        assert script("compare_svd_nn.py", *where).returncode == 0
        folder = tmp_path / "results" / arch
        state = load_checkpoint(folder / "last_model.pt")
        history = json.loads((folder / "history.json").read_text())
        for record in [*history, *state["progress"]["history"]]:
            record.pop("seconds", None), record.pop("samples_per_s", None)
        texts = [(folder / n).read_text() for n in ("test_results.json", "svd_nn_comparison.json")]
        del state["args"]
        found.append(damage.digest(state, history, texts))
    assert found[0] == found[1]
