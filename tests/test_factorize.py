"""Factors on disk: the model's own, read back with the errors that were reported."""

import json

import pytest
import tiny
import torch
from conftest import hashes
from tiny import steep_tokens

import factorize
from lowrank_tokens import errors as error_measures
from lowrank_tokens import shards as shard_folder
from lowrank_tokens.errors import rel_error, rest_note
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import (
    FactorWriter,
    load_factors,
    read_factors,
    restore,
    store,
)
from lowrank_tokens.linalg import normalise
from qwenvl_dataloader import RealQwenVLDataset
from training import checkpoint, rank_budget
from training.checkpoint import load_model

TARGET = 0.25


@pytest.fixture(scope="module")
def results(tiny_cache, tmp_path_factory):
    """A results folder with a ResMLP of rank 12, trained for one epoch."""
    import train_real_data
    from common import arguments

    folder = tmp_path_factory.mktemp("factorize") / "results"
    flags = "--epochs 1 --rank 12 --refine_steps 2 --oversample 4 --hidden_dim 16".split()
    argv = ["--cache_dir", tiny_cache, "--results_dir", folder, "--log_dir", folder.parent, *flags]
    args = arguments.parse(train_real_data.get_args_parser(), [str(a) for a in argv])
    assert train_real_data.main(args) == 0
    return folder


@pytest.fixture
def write(script, tiny_cache, results, tmp_path):
    """Run factorize.py into tmp_path/out; ends well unless `fails`."""

    def run(*flags, cache=tiny_cache, fails=False, status=None):
        argv = ["--cache_dir", cache, "--results_dir", results, "--out", tmp_path / "out"]
        done = script("factorize.py", *argv, *flags)
        expected = (2 if fails else 0) if status is None else status
        assert done.returncode == expected, done.stderr
        return done

    return run


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def normalised(cache):
    return normalise(RealQwenVLDataset(cache)[range(36)])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("bf16", 2**-8), ("int8", None)])
def test_what_is_read_back_are_the_model_s_factors(
    dtype, tolerance, write, results, tiny_cache, tmp_path
):
    write("--rank", 5, "--dtype", dtype)
    x, mean, std = normalised(tiny_cache)
    model, _ = load_model(results / "ResMLP" / "best_model.pt", torch.device("cpu"))
    with torch.inference_mode():
        parts = [model(part, 5) for part in x[:32].split(8)]
        a, b = (torch.cat(f) for f in zip(*parts, strict=True))
    read = read_factors(tmp_path / "out", range(32))
    assert torch.equal(read.mean, mean[:32]) and torch.equal(read.std, std[:32])
    assert read.ranks.tolist() == [5] * 32
    for found, expected, along in ((read.a, a, -2), (read.b, b, -1)):
        if tolerance is None:  # half a step of the largest value of each component
            allowed = expected.abs().amax(along, keepdim=True) / 254 * (1 + 1e-4)
        else:
            allowed = tolerance * expected.abs()
        assert ((found - expected).abs() <= allowed).all()


@pytest.mark.parametrize("flags", [["--rank", 7], ["--target_error", TARGET, "--dtype", "int8"]])
def test_tokens_come_back_in_the_encoder_s_units_with_the_reported_errors(
    flags, write, tiny_cache, tmp_path
):
    done = write(*flags)
    assert done.stdout.startswith("DEMO data")
    features = RealQwenVLDataset(tiny_cache)[range(36)].double()
    tokens = load_factors(tmp_path / "out")
    assert tokens.shape == features.shape and tokens.dtype == torch.float32
    norm = torch.linalg.matrix_norm
    original = norm(features - tokens) / norm(features)
    read = read_factors(tmp_path / "out")
    normal = rel_error(normalised(tiny_cache)[0], read.a, read.b)
    errors = manifest_of(tmp_path / "out")["errors"]
    for name, values in (("rel_error", normal), ("rel_error_original", original)):
        assert errors[name]["mean"] == pytest.approx(float(values.mean()), rel=1e-5)
        assert errors[name]["p90"] == pytest.approx(float(values.quantile(0.9)), rel=1e-5)
        assert f"mean {errors[name]['mean']:.5f}" in done.stdout


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_target_is_met_by_what_is_stored_of_every_image_and_not_one_rank_lower(
    dtype, write, tiny_cache, tmp_path
):
    write("--target_error", TARGET, "--dtype", dtype)
    x = normalised(tiny_cache)[0]
    read = read_factors(tmp_path / "out")
    assert len(set(read.ranks.tolist())) > 2
    assert rel_error(x, read.a, read.b).max() <= TARGET
    for i, rank in enumerate(read.ranks.tolist()):
        less = rel_error(x[i], read.a[i, :, : rank - 1], read.b[i, : rank - 1])
        assert less > TARGET * (1 - 1e-5)
    ranks = manifest_of(tmp_path / "out")["ranks"]
    assert (ranks["min"], ranks["max"]) == (read.ranks.min(), read.ranks.max())


def test_rows_are_read_in_the_order_asked_for(write, tmp_path):
    write("--target_error", TARGET)
    rows = [30, 2, 17]
    assert torch.equal(load_factors(tmp_path / "out", rows), load_factors(tmp_path / "out")[rows])
    few, every = read_factors(tmp_path / "out", rows), read_factors(tmp_path / "out")
    assert few.ranks.tolist() == every.ranks[rows].tolist()
    assert torch.equal(few.a, every.a[rows][..., : few.ranks.max()])
    assert torch.equal(load_factors(tmp_path / "out", [-1])[0], load_factors(tmp_path / "out")[35])
    for row in (-37, 36):
        with pytest.raises(IndexError, match=f"row {row} .* give 0 to 35"):
            load_factors(tmp_path / "out", [row])


def test_int8_adds_no_more_error_than_half_a_step_of_each_component(tokens):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 24, 6, generator=generator), torch.randn(3, 6, 40, generator=generator)
    a[..., 2] = 0
    b *= torch.logspace(2, -3, 6)[:, None]  # components of very different size
    stored = store(a, b, "int8")
    assert stored.a.dtype == stored.b.dtype == torch.int8
    back_a, back_b = restore(stored)
    assert ((back_a - a).abs() <= a.abs().amax(-2, keepdim=True) / 254 * 1.0001).all()
    assert ((back_b - b).abs() <= b.abs().amax(-1, keepdim=True) / 254 * 1.0001).all()
    assert back_a[..., 2].abs().max() == 0


def test_the_bytes_on_disk_are_those_of_the_values(write, tmp_path):
    sizes = {}
    for dtype in ("float32", "bf16", "int8"):
        write("--rank", 8, "--dtype", dtype, "--overwrite")
        sizes[dtype] = sum(shard["bytes"] for shard in manifest_of(tmp_path / "out")["shards"])
    values, others = (
        36 * 8 * (16 + 1536),
        36 * (2 * 16 * 4 + 3 * 8 + 8 + 2 * 4),
    )  # ranks and grids too
    scales = {"int8": 36 * 2 * 8 * 4}
    for dtype, width in (("float32", 4), ("bf16", 2), ("int8", 1)):
        header = sizes[dtype] - (values * width + others + scales.get(dtype, 0))
        assert 0 < header < 1000


@pytest.mark.parametrize("flags", [["--rank", 6], ["--target_error", TARGET]])
def test_an_interrupted_run_goes_on_and_its_folder_is_byte_identical(
    flags, write, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 10)
    flags = [*flags, "--batch_size", 4]
    write(*flags)
    whole = hashes(tmp_path / "out")
    assert len(whole) == 5
    calls = []

    def interrupted(*args, factorise=factorize.factorise):
        calls.append(len(args[1]))
        if sum(calls) > 25:
            raise KeyboardInterrupt
        return factorise(*args)

    with monkeypatch.context() as patched:
        patched.setattr(factorize, "factorise", interrupted)
        write(*flags, "--overwrite", status=130)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(InputError, match="interrupted, run the same command to finish it"):
        load_factors(tmp_path / "out")
    (tmp_path / "out" / ".factors-00002.safetensors.1.tmp").write_bytes(b"half a shard")
    other = write("--rank", 3, fails=True).stderr
    assert "was begun with" in other and "now it is 3" in other
    assert "images are already there" in write(*flags).stdout
    assert hashes(tmp_path / "out") == whole


def test_damage_to_a_finished_shard_between_two_runs_is_never_sealed(
    write, script, tmp_path, monkeypatch
):
    """The manifest took the hash of the shard as it was at the end: --verify found it whole."""
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 18)
    write_shard = FactorWriter.write_shard

    def interrupted(self, shard, images):
        if shard == 1:
            raise KeyboardInterrupt
        write_shard(self, shard, images)

    with monkeypatch.context() as patched:
        patched.setattr(FactorWriter, "write_shard", interrupted)
        write("--rank", 12, status=130)
    path = tmp_path / "out" / "factors-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-8192:-4096] = bytes(4096)
    path.write_bytes(data)
    write("--rank", 12)
    done = script("factorize.py", "--verify", "--out", tmp_path / "out")
    assert done.returncode == 2 and "factors-00000.safetensors does not match" in done.stderr


def test_a_target_that_few_channels_meet_alone_is_reported_with_the_error_of_the_rest():
    """Two of many channels × 1000: a raw error of 0.16 was met while the others had 1.13."""
    images = list(steep_tokens(3, 16, 200))
    assert rest_note(images, images) is None
    for tokens in images:
        tokens[:, [7, 50]] *= 1000
    decoded = [torch.zeros_like(tokens) for tokens in images]
    for tokens, found in zip(images, decoded, strict=True):
        found[:, [7, 50]] = 1.01 * tokens[:, [7, 50]]
    note = rest_note(images, decoded)
    assert note.startswith("2 channels (") and note.endswith("about the rest: there it is 1.000")


def test_a_run_with_a_target_prints_that_note(write, monkeypatch):
    assert "about the rest" not in write("--target_error", TARGET).stdout
    monkeypatch.setattr(error_measures, "MOST_ENERGY", 0.0)
    assert "about the rest: there it is 0." in write("--target_error", TARGET, "--overwrite").stdout


def test_a_target_in_bytes_prints_that_note_too(script, tmp_path):
    """It was printed beside a target of error alone."""
    tokens = steep_tokens(30)
    caches = {"even": tokens, "uneven": tokens * torch.ones(48).index_fill(0, torch.tensor(7), 200)}
    for name, images in caches.items():
        cache, out = tiny.write_cache(tmp_path / name, images), tmp_path / f"{name}.safetensors"
        fitted = script("experiments.fit_codec", "--cache_dir", cache, "--out", out)
        assert fitted.returncode == 0, fitted.stderr
        flags = "--cache_dir", cache, "--exact", "--codec", out, "--target_kb", 0.2
        done = script("factorize.py", *flags, "--out", tmp_path / f"coded {name}")
        assert done.returncode == 0, done.stderr
        note = "note: 1 channels (7) hold"
        assert (
            (note in done.stdout)
            == ("the rest: there it is 0." in done.stdout)
            == (name == "uneven")
        ), done.stdout


def test_a_finished_folder_is_replaced_only_when_asked_to(write, tmp_path):
    write("--rank", 4)
    before = hashes(tmp_path / "out")
    assert "holds a finished folder of factors: use it" in write("--rank", 4, fails=True).stderr
    assert "begun with rank = 4, now it is 3" in write("--rank", 3, fails=True).stderr
    assert hashes(tmp_path / "out") == before
    write("--rank", 3, "--overwrite")
    assert read_factors(tmp_path / "out", [0]).a.shape == (1, 16, 3)


def test_overwrite_does_not_remove_what_is_no_folder_of_factors(write, cache_copy):
    before = hashes(cache_copy)
    message = write("--rank", 4, "--overwrite", "--out", cache_copy, fails=True).stderr
    assert "holds something else" in message
    assert hashes(cache_copy) == before


MISTAKES = [
    ("factorize.py", "--rank 0", "--rank"),
    ("factorize.py", "--rank 17", "--rank 17 is out of range"),
    ("factorize.py", "--rank 4 --target_error 0.2", "not allowed with argument --rank"),
    ("factorize.py", "--target_error 1", "--target_error"),
    ("factorize.py", "--target_error 1e-4", "out of reach at rank 12"),
    ("factorize.py", "--dtype float16", "--dtype"),
    ("factorize.py", "--arch MLP", "best_model.pt does not exist"),
    ("factorize.py", "--cache_dir nowhere", "nowhere does not exist"),
    ("compare_svd_nn.py", "--target_error 0.2 --rank 4", "not allowed with argument"),
    ("compare_svd_nn.py", "--target_error 1e-4", "out of reach at rank 12"),
]


@pytest.mark.parametrize(("name", "flags", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(
    name, flags, message, script, tiny_cache, results, tmp_path
):
    done = script(name, "--cache_dir", tiny_cache, "--results_dir", results, *flags.split())
    assert done.returncode == 2
    line = done.stderr.strip()
    assert line.startswith("error: ") and "\n" not in line and message in line
    assert list(tmp_path.iterdir()) == []


def test_the_target_that_a_refusal_suggests_can_be_reached(write):
    suggested = write("--target_error", 1e-4, fails=True).stderr
    write("--target_error", suggested.split("; type --target_error ")[1].split()[0])


@pytest.mark.parametrize("flags", [["--rank", 4], ["--target_error", TARGET, "--dtype", "int8"]])
def test_factors_that_are_not_finite_are_refused(flags, write, monkeypatch):
    def broken(*args, **options):
        model, state = load_model(*args, **options)
        model.row_net.head.weight.data[0, 0] = torch.nan
        return model, state

    monkeypatch.setattr(checkpoint, "load_model", broken)
    assert "factors are not finite: train it again" in write(*flags, fails=True).stderr


def test_a_manifest_cannot_name_a_file_outside_its_folder(write, tmp_path):
    write("--rank", 2)
    manifest = manifest_of(tmp_path / "out")
    shard = tmp_path / "out" / manifest["shards"][0]["file"]
    shard.rename(tmp_path / shard.name)
    manifest["shards"][0]["file"] = f"../{shard.name}"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="names a file outside its folder"):
        load_factors(tmp_path / "out")


@pytest.mark.parametrize("flags", [["--rank", 2], ["--target_error", TARGET]])
def test_a_damaged_shard_is_refused_with_its_name(flags, write, tmp_path):
    write(*flags)
    shard = tmp_path / "out" / "factors-00000.safetensors"
    whole = shard.read_bytes()
    for damaged, reason in (
        (whole[:-1], f"has {len(whole) - 1} bytes, not {len(whole)}"),
        (b"\xff" * 64 + whole[64:], "is damaged"),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{shard.name} {reason}"):
            load_factors(tmp_path / "out")
    shard.write_bytes(whole)
    manifest = manifest_of(tmp_path / "out")
    manifest["feature_dim"] = 1535
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its manifest says"):
        load_factors(tmp_path / "out")
    with pytest.raises(InputError, match="name a folder of factors"):
        load_factors(tmp_path)


def test_compare_holds_ranks_per_image_against_one_fixed_rank(script, tiny_cache, results):
    flags = ["--target_error", TARGET]
    done = script("compare_svd_nn.py", "--cache_dir", tiny_cache, "--results_dir", results, *flags)
    assert done.returncode == 0, done.stderr
    comparison = json.loads((results / "ResMLP" / "svd_nn_comparison.json").read_text())
    budget = comparison["rank_per_image"]
    assert (results / "ResMLP" / "rank_per_image.png").is_file()
    network, svd = budget["network"], budget["svd"]
    assert (
        "error against that" in done.stdout and f"{network['fixed']['rank']} for all" in done.stdout
    )
    assert max(network["rel_error"]["max"], svd["rel_error"]["max"]) <= TARGET
    assert network["ranks"]["mean"] >= svd["ranks"]["mean"]
    assert network["fixed_for_all"]["rank"] == network["ranks"]["max"]
    assert network["fixed_for_all"]["images_within_target"] == 6


def test_compare_and_factorize_agree_about_the_rank_that_meets_a_target(
    write, script, tiny_cache, results, tmp_path
):
    dataset = RealQwenVLDataset(tiny_cache)
    rows = dataset.split.test
    model, _ = load_model(results / "ResMLP" / "best_model.pt", torch.device("cpu"))
    x = normalise(dataset[rows])[0]
    with torch.inference_mode():
        a, b = model(x, 12)
    # a target that an image meets at rank r before its factors are rounded, and not after it
    curve = rank_budget.error_curve(x, a, b)
    r = int((curve[0] <= TARGET).long().argmax())
    target = float(curve[0, r]) * (1 + 3e-6)
    assert rank_budget.error_curve(x, *restore(store(a, b, "bf16")))[0, r] > target
    write("--target_error", target)
    written = read_factors(tmp_path / "out", rows).ranks
    assert written[0] == r + 1
    where = ["--cache_dir", tiny_cache, "--results_dir", results]
    done = script("compare_svd_nn.py", *where, "--target_error", target)
    assert done.returncode == 0 and "network as stored in bf16" in done.stdout
    comparison = json.loads((results / "ResMLP" / "svd_nn_comparison.json").read_text())
    ranks = comparison["rank_per_image"]["network"]["ranks"]
    assert ranks["mean"] == float(written.double().mean())
    assert (ranks["min"], ranks["max"]) == (int(written.min()), int(written.max()))


def test_the_network_s_factors_are_coded_about_as_well_as_the_exact_ones(
    write, script, tiny_cache, tmp_path
):
    codec = tmp_path / "codec.safetensors"
    done = script("experiments.fit_codec", "--cache_dir", tiny_cache, "--out", codec)
    assert done.returncode == 0, done.stderr
    errors = []
    for flags in ([], ["--exact"]):
        write("--codec", codec, "--step", 3, *flags, "--overwrite")
        errors.append(manifest_of(tmp_path / "out")["errors"]["rel_error_original"]["mean"])
    assert abs(errors[0] / errors[1] - 1) < 0.2, errors
