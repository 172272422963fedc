"""Rivals at equal bytes: real streams round trip, tables interpolate and never extrapolate."""

import copy
import json
import math

import pytest
import torch
from conftest import picture, write_parquet
from filelock import FileLock
from tiny import TinyEncoder, steep_tokens

from experiments import compare_bytes, rivals
from experiments.bytes_tables import (
    Point,
    bytes_at,
    bytes_tables,
    jackknife_95,
    reader_tables,
)
from experiments.coded_rivals import (
    CodecStatistics,
    Coded,
    CodedTransform,
)
from experiments.compare_bytes import Towers, fold_parts, thinned
from experiments.head_steps import CodedHeadSteps, FactorsHeadSteps, reader_of
from experiments.rivals import (
    BITS,
    PICTURE_FORMS,
    FactorsDeflate,
    FactorsQuantised,
    PcaDeflate,
    Pictures,
    TokenBasis,
    TokenImage,
    TokensDropped,
    allocate_bits,
    quantise,
)
from heads.task_head import TaskHead, squared_error
from lowrank_tokens.codec import Codec
from lowrank_tokens.linalg import denormalise, normalise
from svd_baseline import interval_95

T, D, GRID = 16, 48, (4, 4)


@pytest.fixture
def image():
    return TokenImage(0, steep_tokens(1, T, D)[0].bfloat16(), GRID)


@pytest.fixture
def linear_head():
    """A head of 40 linear outputs, of tokens and features that are mixed at random."""

    class Linear(TaskHead):
        weight = torch.randn(T * D, 40, generator=torch.Generator().manual_seed(3))

        def outputs(self, tokens, rows):
            return tokens.flatten(1) @ self.weight

        def loss(self, outputs, full):
            return squared_error(outputs, full)

        def agreement(self, outputs, full):
            raise AssertionError("not asked for")

    return Linear()


def error(raw, image):
    return float((raw - image.raw).norm() / image.raw.norm())


def error_of(code, data, knob, image):
    """Return the error of what is decoded from an image's bytes."""
    return error(code.decode(data, knob, image.grid), image)


def of_training(n=64):
    """Fit a basis to n images of the same kind."""
    x = torch.nn.functional.layer_norm(steep_tokens(n, T, D, seed=1), (D,)).flatten(0, 1)
    centre = x.mean(0)
    _, axes = torch.linalg.eigh(torch.cov(x.mT, correction=0).double())
    axes = axes.flip(-1).float()
    return TokenBasis(centre, axes, (x - centre) @ axes, [T] * n)


def test_bf16_gives_the_cached_tokens_back_to_the_bit(image):
    code = rivals.Bf16((T, D))
    assert torch.equal(code.decode(code.encode(image, None), None, GRID), image.raw)
    assert len(rivals.Bf16((T, D)).encode(image, None)) == 2 * T * D


@pytest.mark.parametrize("kind", [FactorsQuantised, FactorsDeflate])
def test_factors_come_back_from_their_bytes_and_more_bytes_mean_less_error(kind, image):
    code = kind((T, D))
    knobs = code.knobs[::-1][:6][::-1]  # the coarsest steps leave nothing of so small an image
    streams = [code.encode(image, knob) for knob in knobs]
    found = [error_of(code, s, k, image) for s, k in zip(streams, knobs, strict=True)]
    assert found[-1] < 0.07 < found[0]
    assert found == sorted(found, reverse=True)
    assert [len(s) for s in streams] == sorted(len(s) for s in streams)


def test_quantised_factors_have_the_error_of_the_truncated_svd_and_of_their_bits(image):
    u, sigma, vh = torch.linalg.svd(image.x, full_matrices=False)
    best = denormalise(u[:, :8] * sigma[:8] @ vh[:8], image.mean, image.std)
    sizes, errors = [], []
    for bits in (4, 5, 6, 8):
        code = FactorsQuantised((T, D), bits=bits)
        data = code.encode(image, 8)
        sizes.append(len(data))
        errors.append(error_of(code, data, 8, image))
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    assert abs(errors[-1] - error(best, image)) < 0.01


def test_statistics_come_back_within_half_a_step(image):
    _, mean, std = normalise(image.raw)
    assert (image.mean - mean).abs().max() <= rivals.MEAN_STEP / 2 + 1e-5
    assert (image.std / std).log().abs().max() <= rivals.LOG_STD_STEP / 2 + 1e-5
    assert torch.allclose(denormalise(image.x, image.mean, image.std), image.raw, atol=1e-4)


def test_symbols_of_any_size_come_back_from_deflate():
    symbols = torch.tensor([[0, -1, 127, -127], [-128, 128, 32767, -32768]], dtype=torch.int16)
    assert torch.equal(rivals.inflate(rivals.deflate(symbols), (2, 4)), symbols)


def test_rounding_has_its_dead_zone():
    values = torch.tensor([0.59, -0.59, 0.61, -0.61, 1.4])
    assert rivals.round_down(values).tolist() == [0, 0, 1, -1, 1]


def test_averaged_tokens_are_the_means_of_their_blocks_also_at_the_edge(image):
    code = rivals.TokensAveraged((T, D), 4)
    data = code.encode(image, 2)
    assert len(data) < 4 * (D + 2) + 30  # a byte a number, a scale each, DEFLATE's own bytes
    first = code.decode(data, 2, GRID)[0]
    wanted = image.raw[[0, 1, 4, 5]].mean(0)
    assert (first - wanted).abs().max() <= 0.51 * wanted.abs().max() / 127 + 1e-2
    uneven = TokenImage(0, torch.arange(9.0)[:, None] + torch.tensor([0.0, 1000.0]), (3, 3))
    code = rivals.TokensAveraged((9, 2), 3)
    tokens = code.decode(code.encode(uneven, 2), 2, (3, 3))[:, 1] - 1000
    assert tokens == pytest.approx([2, 2, 3.5, 2, 2, 3.5, 6.5, 6.5, 8], abs=5)


def test_tokens_that_are_least_alike_are_kept_and_fill_the_places_of_their_like():
    generator = torch.Generator().manual_seed(0)
    kinds = 10 * torch.randn(4, D, generator=generator)
    of_place = torch.arange(T) % 4
    raw = kinds[of_place] + 0.01 * torch.randn(T, D, generator=generator)
    image = TokenImage(0, raw.bfloat16(), GRID)
    code = TokensDropped((T, D))
    data = code.encode(image, 4)
    assert error(code.decode(data, 4, GRID), image) < 0.02
    assert len(data) < 4 * D + 60 < 2 * T * D
    chosen, filled = code.choose(image.raw, 4)
    assert sorted(of_place[chosen].tolist()) == [0, 1, 2, 3]
    assert torch.equal(of_place[chosen][filled], of_place)
    assert len(code.choose(image.raw, 2 * T)[0]) == T  # an image has no more


def test_bits_are_allocated_as_the_best_of_all_allocations():
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(3, len(BITS), generator=generator, dtype=torch.float64).sort(descending=True)
    best = {}
    for budget in range(13):
        choices = [
            (table.values[0, i] + table.values[1, j] + table.values[2, k]).item()
            for i, a in enumerate(BITS)
            for j, b in enumerate(BITS)
            for k, c in enumerate(BITS)
            if a + b + c <= budget
        ]
        best[budget] = min(choices)
    for budget, least in best.items():
        chosen = allocate_bits(table.values, budget)
        assert sum(BITS[i] for i in chosen) <= budget
        found = sum(table.values[g, i].item() for g, i in enumerate(chosen))
        assert found == pytest.approx(least)


def test_quantised_values_are_within_half_a_step_of_each_row():
    values = torch.stack([torch.linspace(-1, 1, 11), torch.linspace(0, 9, 11)])
    symbols, scale = quantise(values, 4)
    assert (symbols.float() * scale.float()[:, None] - values)[0].abs().max() <= 0.5 / 7 + 1e-3
    assert (symbols.float() * scale.float()[:, None] - values)[1].abs().max() <= 4.5 / 7 + 1e-2


def test_pca_comes_back_from_its_bytes(image):
    code = PcaDeflate((T, D), of_training())
    data = [code.encode(image, knob) for knob in code.knobs]
    found = [error_of(code, s, k, image) for s, k in zip(data, code.knobs, strict=True)]
    assert found[-1] < 0.5 * found[0]
    assert len(data[0]) < len(data[-1])
    assert code.shared_bytes(code.knobs[-1]) >= 2 * D


@pytest.mark.parametrize("in_metric", [False, True])
def test_coded_rivals_come_back_from_their_bytes_with_the_statistics_of_the_codec(in_metric):
    training = steep_tokens(24, T, D, seed=1)
    metric = torch.diag(torch.linspace(0.5, 1.5, D)) if in_metric else None
    codec = Codec.fit([(x, GRID) for x in training.split(8)], metric=metric)
    statistics = CodecStatistics(codec)
    image = TokenImage(0, steep_tokens(1, T, D)[0].bfloat16(), GRID, statistics)
    assert image.statistics == statistics.encode(image.raw, GRID)
    assert torch.allclose(denormalise(image.x, image.mean, image.std), image.raw, atol=1e-3)
    codes = [Coded(codec, (T, D), statistics), CodedTransform(codec, (T, D), statistics)]
    names = ["coded", "transform"]
    if in_metric:
        names = [f"{name}_in_metric" for name in names]
    assert [code.name for code in codes[:2]] == names
    for code in codes:
        coarse, fine = code.knobs[len(code.knobs) // 2], code.knobs[-1]
        streams = [code.encode(image, knob) for knob in (coarse, fine)]
        found = [error_of(code, s, k, image) for s, k in zip(streams, (coarse, fine), strict=True)]
        assert len(streams[0]) < len(streams[1])
        assert found[1] < 0.1 and found[1] < found[0], code.name


def test_two_codecs_of_one_kind_and_two_heads_do_not_share_what_they_prepared(linear_head):
    """Prepared factors were kept under "in a metric or not", a head's reader under nothing."""
    image = TokenImage(0, steep_tokens(1, T, D)[0].bfloat16(), GRID)
    codecs = [Codec.fit([(steep_tokens(24, T, D, seed=s), GRID)]) for s in (1, 2)]
    for codec in codecs:
        code = Coded(codec, (T, D), CodecStatistics(codec))
        assert code.encode(image, 0.5) == codec.encode(image.raw, GRID, step=0.5)
    other = copy.deepcopy(linear_head)
    other.weight = -other.weight
    readers = [reader_of(image, head, "cpu") for head in (linear_head, other, linear_head)]
    assert torch.allclose(readers[1].full, -readers[0].full) and readers[2] is readers[0]


def test_head_steps_lower_the_head_s_error_at_nearly_the_same_bytes(linear_head):
    training = steep_tokens(24, T, D, seed=1)
    codec = Codec.fit([(x, GRID) for x in training.split(8)], metric=torch.eye(D))
    statistics = CodecStatistics(codec)
    plain, steps = (
        Coded(codec, (T, D), statistics),
        CodedHeadSteps(codec, (T, D), statistics, linear_head, "cpu"),
    )
    assert steps.name == "coded_in_metric_head_steps"
    found = []
    for seed in range(4):
        image = TokenImage(0, steep_tokens(1, T, D, seed=seed)[0].bfloat16(), GRID, statistics)
        wanted = linear_head.outputs(image.raw[None], None)
        for code in (plain, steps):
            data = code.encode(image, 0.5)
            got = linear_head.outputs(code.decode(data, 0.5, GRID)[None], None)
            found.append((float(linear_head.error(got, wanted)), len(data)))
    before, after = torch.tensor(found[::2]), torch.tensor(found[1::2])
    assert (after[:, 0] <= before[:, 0]).all()  # the best of all tries, the first among them
    assert after[:, 0].mean() < 0.9 * before[:, 0].mean()
    assert after[:, 1].mean() < 1.15 * before[:, 1].mean()


def test_factors_with_head_steps_err_less_for_the_head_at_the_same_bytes(image, linear_head):
    control = FactorsHeadSteps((T, D), rivals.Statistics(), linear_head, "cpu")
    wanted = linear_head.outputs(image.raw[None], None)
    streams = [code.encode(image, 4) for code in (FactorsQuantised((T, D)), control)]
    assert len(streams[1]) < 1.05 * len(streams[0])
    read = [control.decode(s, 4, GRID)[None] for s in streams]
    errors = [float(linear_head.error(linear_head.outputs(x, None), wanted)) for x in read]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("in_metric", [False, True])
@pytest.mark.parametrize("grid", [(2, 3), (3, 5), (4, 4)])
def test_an_image_of_any_grid_comes_back_from_its_own_bytes_by_every_code(
    grid, in_metric, linear_head
):
    tokens = grid[0] * grid[1]
    linear_head.weight = linear_head.weight[: tokens * D]
    batches = [(steep_tokens(24, T, D, seed=1), GRID), (steep_tokens(9, 6, D, seed=2), (2, 3))]
    codec = Codec.fit(batches, metric=torch.eye(D) if in_metric else None)
    statistics, shape, basis = CodecStatistics(codec), (T, D), of_training()
    image = TokenImage(0, steep_tokens(1, tokens, D)[0].bfloat16(), grid, statistics)
    codes = [Coded(codec, shape, statistics), CodedTransform(codec, shape, statistics)]
    if in_metric:
        codes += [CodedHeadSteps(codec, shape, statistics, linear_head, "cpu")]
    else:
        codes += [FactorsQuantised(shape, statistics), FactorsDeflate(shape, statistics)]
        codes += [PcaDeflate(shape, basis, statistics), rivals.Bf16(shape), TokensDropped(shape)]
        codes += [FactorsHeadSteps(shape, statistics, linear_head, "cpu")]
        codes += [rivals.TokensAveraged(shape, 4)]
    for code in codes:
        data = code.encode(image, code.knobs[-1])
        raw = code.decode(data, code.knobs[-1], grid)
        assert raw.shape == image.raw.shape
        # these tokens have nothing of their neighbours
        coarse = {
            "tokens_dropped": 1.3,
            "tokens_averaged": 1.3,
        }
        bound = coarse.get(code.name, 0.3 if "head_steps" in code.name else 0.12)
        assert error(raw, image) < bound, code.name


@pytest.mark.parametrize("form", PICTURE_FORMS)
def test_pictures_are_compressed_decoded_and_encoded_again(form, tiny_data):
    from encoders.image_sources import open_source, read_image

    encoder = TinyEncoder()
    picture = read_image(next(open_source(tiny_data).batches(1))[0][1]["image"]).resize((28, 28))
    raw = encoder.encode(encoder.preprocess(picture)[None])[0]
    image = TokenImage(3, raw, (4, 4))
    code = Pictures(form, (16, 12), {3: picture}.get, encoder)
    low, high = code.encode(image, 5), code.encode(image, 95)
    assert len(low) < len(high)
    assert error_of(code, high, 95, image) < error_of(code, low, 5, image) < 0.5


def test_what_one_encoder_made_of_a_picture_is_not_taken_for_anothers(tmp_path):
    """Kept outputs had the picture file's hash for a name: another encoder's came back."""
    found = []
    for number, weights in enumerate("ab"):
        towers = Towers.__new__(Towers)
        towers.kept, towers.encoder = tmp_path, TinyEncoder()
        towers.encoder.weights_sha256 = weights
        code = Pictures("jpeg", (16, 12), None, towers.encoder)
        code.decode = lambda data, knob, grid, number=number: torch.full((16, 12), float(number))
        found += [towers.decoded(code, b"a picture", 30, (4, 4)) for _ in range(2)]
    assert [float(tokens.mean()) for tokens in found] == [0, 0, 1, 1]


def test_log_bytes_are_interpolated_linearly_between_knobs():
    # halfway between the errors 0.2 and 0.1: the geometric mean of 100 and 400 bytes
    assert bytes_at([0.2, 0.1], [100.0, 400.0], 0.15) == pytest.approx(200)
    assert bytes_at([0.1, 0.2], [400.0, 100.0], 0.175) == pytest.approx(math.sqrt(2) * 100)
    assert bytes_at([0.2, 0.1, 0.05], [100.0, 400.0, 800.0], 0.05) == pytest.approx(800)


def test_the_interval_of_a_mean_by_leaving_groups_out_is_the_t_interval_of_the_groups():
    groups = [name for name in "abcdef" for _ in range(3)]
    values = torch.randn(18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = jackknife_95(lambda images: float(values.numpy()[images].mean()), groups)
    wanted = interval_95(values, groups)
    assert [math.log(end) for end in found["interval_95"]] == pytest.approx(wanted)
    assert math.log(found["mean"]) == pytest.approx(float(values.mean()))
    assert jackknife_95(lambda images: 0.0, list("aabbcc"))["interval_95"] is None
    assert jackknife_95(lambda images: None, groups) is None


def test_a_method_that_takes_thrice_the_bytes_everywhere_is_said_to_with_no_doubt():
    """However much the images differ: what they share is no doubt about the ratio."""
    rng = torch.Generator().manual_seed(1)
    scale = torch.rand(12, generator=rng, dtype=torch.float64) + 0.5
    groups = [name for name in "abcdef" for _ in range(2)]

    def curve(times):
        return [
            Point(
                k, 0, False, 1.0, {"bytes": times * 1000 * k * scale, "raw_error": 0.4 / k * scale}
            )
            for k in (1, 2, 4, 8)
        ]

    entry = bytes_tables({"coded": curve(1), "transform": curve(3)}, groups, (10,))["raw_error"][
        "0.16"
    ]
    times = entry["transform"]["times"]["coded"]
    assert times["mean"] == pytest.approx(3)
    assert times["interval_95"] == pytest.approx([3, 3])
    low, high = entry["coded"]["interval_95"]
    assert low < 0.95 * entry["coded"]["alone"] and 1.05 * entry["coded"]["alone"] < high


def test_nothing_is_extrapolated():
    for target in (0.21, 0.09):
        assert bytes_at([0.2, 0.1], [100.0, 400.0], target) is None
    assert bytes_at([0.2], [100.0], 0.2) is None


def test_the_crossing_of_fewest_bytes_counts():
    assert bytes_at([0.3, 0.1, 0.3, 0.1], [1.0, 100.0, 200.0, 400.0], 0.2) == pytest.approx(10)


def test_knobs_are_thinned_to_both_ends():
    assert thinned([1, 2, 3, 4, 5, 6, 7], 4) == [1, 3, 5, 7]
    assert thinned([None], 5) == [None]


def test_scores_at_some_bytes_are_interpolated_and_their_differences_paired():
    """However much the images differ: what all methods share is no doubt about a difference."""
    rng = torch.Generator().manual_seed(1)
    level = torch.rand(12, generator=rng, dtype=torch.float64)
    groups = [name for name in "abcdef" for _ in range(2)]
    sizes = torch.ones(12, dtype=torch.float64)

    def curve(shift):
        return [
            Point(k, 0, False, 1.0, {"bytes": size * sizes, "box_precision": level + gain + shift})
            for k, size, gain in ((1, 500.0, 0.0), (2, 50_000.0, 0.2))
        ]

    full = [Point(None, 0, False, 1.0, {"bytes": 8e5 * sizes, "box_precision": level + 0.5})]
    report = reader_tables({"bf16": full, "coded": curve(0.0), "transform": curve(-0.1)}, groups)
    entry = report["box_precision"]["5000"]
    assert entry["coded"]["mean"] == pytest.approx(float(level.mean()) + 0.1)  # half way, in log
    low, high = entry["coded"]["interval_95"]
    assert high - low > 0.1
    assert entry["transform"]["minus"]["coded"]["mean"] == pytest.approx(-0.1)
    assert entry["transform"]["minus"]["coded"]["interval_95"] == pytest.approx([-0.1, -0.1])
    assert entry["coded"]["minus"]["bf16"]["mean"] == pytest.approx(-0.4)
    few = reader_tables({"bf16": full, "coded": curve(0.0)[:1]}, groups)
    assert few == {}  # nothing is extrapolated


def test_every_group_is_measured_once_by_what_was_fitted_to_others(dataset):
    parts = fold_parts(dataset, 3, None)
    groups = dataset.rows["group"].to_pylist()
    measured = [groups[row] for part in parts for row in part.test]
    assert set(measured) == set(groups)
    assert max(measured.count(group) for group in groups) == compare_bytes.CROPS
    for part in parts:
        own = {groups[row] for row in part.test}
        assert not own & {groups[row] for row in part.train + part.validation}
        assert not {groups[row] for row in part.train} & {groups[row] for row in part.validation}


@pytest.mark.slow
def test_images_that_codec_or_probe_has_seen_are_not_measured(
    dataset, script, tiny_cache, tmp_path
):
    """Before, a codec of the very test images was compared as if it knew none."""
    test = dataset.split.test.tolist()
    hashes = dataset.rows["image_sha256"].take(test[:1]).to_pylist()
    codec = Codec.fit([(dataset[test], dataset.grid)], image_hashes=hashes)
    codec.save(tmp_path / "leaky.safetensors")
    done = script(
        *("experiments.compare_bytes", "--quick", "--cache_dir", tiny_cache, "--device", "cpu"),
        *("--codec", tmp_path / "leaky.safetensors", "--results_dir", tmp_path / "r"),
    )
    assert done.returncode == 0, done.stderr
    assert "1 test images left out that the codec has seen" in done.stdout
    found = json.loads((tmp_path / "r" / "bytes.json").read_text())
    assert found["n_images"] == len(test) - 1 and "codec has seen" in found["left_out"]


def test_two_comparisons_do_not_mix_their_results(script, tiny_cache, tmp_path):
    """Before, there was no lock: partial results of both went into one file."""
    (tmp_path / "r").mkdir()
    with FileLock(tmp_path / "r" / ".bytes.lock"):
        done = script(
            *("experiments.compare_bytes", "--quick", "--cache_dir", tiny_cache),
            *("--results_dir", tmp_path / "r"),
        )
    assert done.returncode == 2
    assert "another compare_bytes writes bytes.json there" in done.stderr


def qwen_data_set(folder):
    """Twelve pictures, three questions with a box of its own each."""
    records = [
        {
            "image": {"bytes": picture(number), "path": f"{number}.png"},
            "question": f"question {question}",
            "answer": ["that"],
            "bbox": [20.0 * question, 10.0 * question, 20.0, 12.0],
        }
        for number in range(12)
        for question in range(3)
    ]
    columns = {name: [record[name] for record in records] for name in records[0]}
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", columns)
    return folder


@pytest.mark.painted
@pytest.mark.slow
def test_readers_judge_folds_of_a_qwen_cache_with_several_boxes_an_image_and_a_cut_run_goes_on(
    encode, script, tmp_path, monkeypatch
):
    monkeypatch.setattr(compare_bytes, "FEW_KNOBS", 2)
    monkeypatch.setattr(compare_bytes, "FEW", {})
    assert encode(qwen_data_set(tmp_path / "data")).returncode == 0
    command = ["experiments.compare_bytes", "--cache_dir", tmp_path / "cache", "--folds", 3]
    command += ["--results_dir", tmp_path / "r", "--dataset_dir", tmp_path / "data"]
    real, calls = compare_bytes.errors, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 100:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(compare_bytes, "errors", interrupted)
        assert script(*command).returncode == 130
    partial = tmp_path / "r" / "bytes.partial.jsonl"
    kept = len(partial.read_text().splitlines()) - 1
    assert kept > 3
    with partial.open("a") as file:
        file.write('{"stage": "part 0 factors_quantised", "row": 8, "val')  # killed in a line
    done = script(*command)
    assert done.returncode == 0, done.stderr
    assert f"{kept} points are already there" in done.stdout and not partial.exists()
    assert not (tmp_path / "r" / "bytes.towers").exists()
    found = json.loads((tmp_path / "r" / "bytes.json").read_text())
    assert found["split"] == "3 folds" and found["cache_sha256"]
    assert found["all_groups"]["n_groups"] == 12 > found["n_groups"]
    names = "bf16 coded transform factors_quantised factors_deflate pca_deflate tokens_averaged"
    names += " tokens_dropped jpeg webp avif"
    assert found["methods"].keys() == set(names.split())
    for name, points in found["methods"].items():
        for point in points:
            assert point["bytes"]["mean"] > 0 and point["read_ms"] >= 0
            assert 0 < point["box_precision"]["mean"] <= 1
            assert {"raw_error", "rel_error", "box_iou", "retrieval"} <= set(point)
        assert any("box_precision_trained" in point for point in points), name
    assert found["methods"]["bf16"][0]["raw_error"]["mean"] == 0
    assert found["methods"]["avif"][0]["needs"] == "the encoder"
    assert any("no matching" in note for note in found["notes"])
    # three boxes an image: the share of tokens that any of them covers
    assert 0.2 < found["chance"]["box_precision"] < 0.9
    assert (tmp_path / "r" / "bytes.png").stat().st_size > 10_000


@pytest.mark.painted
@pytest.mark.slow
def test_the_command_writes_bytes_of_every_method_that_the_cache_allows(
    script, tiny_cache, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(PcaDeflate, "knobs", (4, 16))
    monkeypatch.setattr(Pictures, "knobs", (30, 90))
    flags = [
        "--cache_dir",
        tiny_cache,
        "--dataset_dir",
        tiny_data,
        "--results_dir",
        tmp_path / "r",
        "--device",
        "cpu",
    ]
    done = script("experiments.compare_bytes", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r" / "bytes.json").read_text())
    assert found["data"].startswith("DEMO") and found["split"] == "test"
    names = "bf16 factors_quantised factors_deflate factors_head_steps pca_deflate"
    names += " tokens_averaged tokens_dropped jpeg webp avif"
    assert found["methods"].keys() == set(names.split())
    for points in found["methods"].values():
        for point in points:
            assert point["bytes"]["mean"] > 0
            assert {"raw_error", "rel_error", "task_error", "retrieval"} <= set(point)
    assert found["methods"]["bf16"][0]["raw_error"]["mean"] == 0
    assert (tmp_path / "r" / "bytes.png").stat().st_size > 10_000
