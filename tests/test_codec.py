"""The codec of factors: what is read is what was written, everywhere, or it is refused."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import hashes
from tiny import steep_tokens
from torch.utils.data import DataLoader

import factorize
from lowrank_tokens import shards as shard_folder
from lowrank_tokens import transform
from lowrank_tokens.codec import HEADER, Codec, coded_image, fit, image_for_target
from lowrank_tokens.entropy import (
    HIGHEST,
    LOWEST,
    TOTAL,
    bits_table,
    decode_symbols,
    encode_symbols,
    table,
)
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import VisionTokens, load_factors, read_factors
from lowrank_tokens.linalg import normalise
from lowrank_tokens.transform import OFFSETS, dct, inverse_dct, level_offsets, off_grid, on_grid
from qwenvl_dataloader import RealQwenVLDataset

GRID = (4, 6)
SYMBOLS = np.array([0, 1, -1, 5, -300, 0, 2, 70000, -3, 0, 0, 12])
LEVELS = np.array([-30, -4, 0, 6, 20, -9, 3, 10, 2, -12, 44, 16])
STREAM = "04fcc4084fbf71b7938e3dc35505010000"
# one image as it was coded before levels had offsets
OLDER_IMAGE = (
    "01f28fe72202000300cdcc4c3e05001f0032090d2b01351501010102ffffffcad7ffff7ff9ffffffd3ffffc74bfdff"
    "55ffffffffffffffffffffff5fffffffffff7ff507002fab644b6e6b642fd80172a9a5b0a2ef1865aa5ce39c30941e"
    "ba263ae6a7293ecf7f61aad4895017f9ff32e830000000"
)


def some_tokens(n, grid=GRID, seed=0):
    """[n, T, 48] raw tokens with a spread of means and lengths."""
    tokens = steep_tokens(n, grid[0] * grid[1], seed=seed)
    rng = torch.Generator().manual_seed(seed)
    scale = (0.3 * torch.randn(n, tokens.shape[1], 1, generator=rng)).exp()
    return tokens * scale + 0.2 * torch.randn(n, tokens.shape[1], 1, generator=rng)


@pytest.fixture(scope="module")
def codec():
    return fit(lambda: of_grid(some_tokens(64).split(5)), GRID)


def of_grid(batches, grid=GRID):
    """What `fit` takes: batches of raw tokens, each with its grid."""
    return [(batch, grid) for batch in batches]


def raw_error(raw, decoded):
    return float((raw - decoded).norm() / raw.norm())


def test_a_stored_stream_decodes_to_the_stored_symbols():
    assert encode_symbols(SYMBOLS, LEVELS).hex() == STREAM
    assert decode_symbols(bytes.fromhex(STREAM), LEVELS).tolist() == SYMBOLS.tolist()


def test_an_image_that_an_older_version_coded_is_still_read():
    tensors = {
        "klt": torch.eye(6, dtype=torch.bfloat16),
        **{"rows": torch.zeros(2, 2, 3), "columns": torch.zeros(2, 6)},
        **{"statistics": torch.zeros(2, 2, 3), "starts": torch.tensor([0, 1])},
    }
    tensors = {name: t if name == "klt" else t.to(torch.int16) for name, t in tensors.items()}
    codec = Codec(tensors, {"log_std": 0.0, "statistics_steps": [0.05, 0.3]})
    raw = torch.tensor([[i * j % 7 - 3.0 + 0.1 * i for j in range(6)] for i in range(6)])
    read = codec.decode(bytes.fromhex(OLDER_IMAGE))
    wanted = [-2.907947, -1.775369, -0.853346, 0.218301, 1.184093, 2.190043]
    assert read[1].tolist() == pytest.approx(wanted, abs=1e-4)
    assert raw_error(raw, read) == pytest.approx(0.04322, abs=1e-4)
    assert raw_error(raw, codec.decode(codec.encode(raw, (2, 3), 0.2))) < 0.05


def test_offsets_are_those_of_the_fewest_bits_and_make_an_image_smaller(codec):
    rng = np.random.default_rng(0)
    levels = rng.integers(-30, 55, (300, 7))
    q = np.rint(rng.normal(size=(300, 7)) * 2.0 ** ((levels + 5) / 4)).astype(np.int64)
    found = level_offsets(q, levels)

    def bits(offset):
        rows = np.clip(levels + offset, LOWEST, HIGHEST) - LOWEST
        return bits_table()[rows, np.minimum(abs(q), 2049)].sum(0)

    least = np.min([bits(o) + abs(o) for o in OFFSETS], axis=0)
    assert np.allclose([bits(o)[k] + abs(o) for k, o in enumerate(found)], least, rtol=1e-5)
    assert ((found >= 3) & (found <= 7)).all()
    raw = some_tokens(1, seed=8)[0]
    sizes = []
    for offsets in (OFFSETS, [0]):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(transform, "OFFSETS", offsets)
            data = codec.encode(raw, GRID, 0.2)
        sizes.append(len(data))
        assert raw_error(raw, codec.decode(data)) < 0.05
    assert sizes[0] < sizes[1]


def test_tables_are_integers_that_fall_with_the_symbol_and_sum_to_the_whole():
    for level in range(LOWEST, HIGHEST + 1):
        frequencies = table(level)
        assert sum(frequencies) == TOTAL and min(frequencies) >= 1
        both = [frequencies[0], *(2 * f for f in frequencies[1:-1:2])]
        assert all(a >= b for a, b in pairwise(both[1:]))
    zeros = [table(level)[0] for level in range(LOWEST, HIGHEST + 1)]
    assert all(a >= b for a, b in pairwise(zeros)) and zeros[-1] < zeros[0] / 1000


def test_no_value_is_clipped_and_the_bytes_are_those_that_the_tables_promise():
    rng = np.random.default_rng(0)
    levels = rng.integers(LOWEST - 4, HIGHEST + 4, 20_000)
    symbols = np.rint(rng.normal(size=20_000) * 2.0 ** (levels / 4)).astype(np.int64)
    symbols[:3] = 10**9, -(10**9), 12345
    data = encode_symbols(symbols, levels)
    assert np.array_equal(decode_symbols(data, levels), symbols)
    bits = bits_table()[np.clip(levels, LOWEST, HIGHEST) - LOWEST, np.minimum(abs(symbols), 2049)]
    assert abs(8 * len(data) / bits.sum() - 1) < 0.01
    assert decode_symbols(encode_symbols(symbols[:0], levels[:0]), levels[:0]).size == 0


@pytest.mark.parametrize("grid", [GRID, (4, 4), (1, 7), (9, 8), (12, 3)])
def test_any_grid_is_decoded_and_a_finer_step_errs_less(codec, grid):
    raw = some_tokens(1, grid, seed=1)[0]
    errors, sizes = [], []
    for step in (2.0, 0.5, 0.1, 0.02):
        data = codec.encode(raw, grid, step)
        assert HEADER.unpack_from(data)[2:4] == grid
        errors.append(raw_error(raw, codec.decode(data)))
        sizes.append(len(data))
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    assert errors[-1] < 0.02


def test_tokens_are_the_factors_with_the_statistics_and_the_rank_is_what_the_step_leaves(codec):
    raw = some_tokens(1, seed=2)[0]
    ranks = []
    for step in (3.0, 0.3):
        data = codec.encode(raw, GRID, step)
        a, b, mean, std = codec.factors(data)
        assert torch.allclose((a @ b) * std[:, None] + mean[:, None], codec.decode(data), atol=1e-4)
        ranks.append(a.shape[1])
        _, true_mean, true_std = normalise(raw)
        far = codec.statistics_steps[0] * 24**0.5 / 2, codec.statistics_steps[1] * 24**0.5 / 2
        assert (mean - true_mean[:, 0]).abs().max() <= far[0] + 1e-5
        assert (std.log() - true_std[:, 0].log()).abs().max() <= far[1] + 1e-5
    assert 0 < ranks[0] < ranks[1]


def test_factors_from_outside_are_coded_as_the_exact_ones(codec):
    raw = some_tokens(1, seed=3)[0]
    u, s, vh = torch.linalg.svd(normalise(raw)[0], full_matrices=False)
    given = codec.decode(codec.encode(raw, GRID, 0.3, (u, s, vh.mT)))
    exact = codec.decode(codec.encode(raw, GRID, 0.3))
    # the exact ones are of tokens normalised by the statistics as stored
    assert raw_error(raw, given) < 1.3 * raw_error(raw, exact) + 0.03


def test_constant_tokens_are_coded_at_rank_0(codec):
    raw = torch.full((24, 48), 3.0)
    data = codec.encode(raw, GRID, 1.0)
    assert codec.factors(data)[0].shape == (24, 0)
    assert raw_error(raw, codec.decode(data)) < 0.05


def test_any_flipped_byte_and_any_shorter_stream_is_refused(codec):
    data = codec.encode(some_tokens(1, seed=4)[0], GRID, 1.5)
    for i in range(len(data)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << i % 8
        with pytest.raises(InputError, match="damaged"):
            codec.decode(bytes(flipped))
        with pytest.raises(InputError, match="damaged"):
            codec.decode(data[:i])


def test_a_codec_is_read_as_it_was_saved_and_a_flipped_byte_of_it_is_found(codec, tmp_path):
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    raw = some_tokens(1, seed=5)[0]
    read = Codec.load(path)
    assert read.sha256 == codec.sha256 and read.encode(raw, GRID, 0.5) == codec.encode(
        raw, GRID, 0.5
    )
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        Codec.load(path)
    with pytest.raises(InputError, match="fit a codec"):
        codec.encode(raw, (5, 5), 0.5)


def test_a_target_is_met_and_one_out_of_reach_is_refused(codec):
    raw = some_tokens(1, seed=6)[0]
    by_error = image_for_target(codec, raw, GRID, target_error=0.1)
    assert by_error.errors["rel_error_original"] <= 0.1
    coarser = coded_image(codec, raw, GRID, by_error.step * 2 ** (1 / 16))
    assert coarser.errors["rel_error_original"] > 0.1
    by_size = image_for_target(codec, raw, GRID, target_kb=0.3)
    assert len(by_size.data) <= 300
    with pytest.raises(InputError, match="--target_error 1e-09 is out of reach"):
        image_for_target(codec, raw, GRID, target_error=1e-9)
    with pytest.raises(InputError, match="--target_kb 0.01 is out of reach"):
        image_for_target(codec, raw, GRID, target_kb=0.01)


def test_in_a_metric_the_features_that_count_err_less():
    weight = torch.ones(48, dtype=torch.float64)
    weight[:12] = 25
    raw = some_tokens(1, seed=7)[0]
    errors = []
    for metric in (None, torch.diag(weight)):
        decoded = (c := fit(lambda: of_grid(some_tokens(24).split(8)), GRID, metric)).decode(
            image_for_target(c, raw, GRID, target_kb=0.4).data
        )
        errors.append(float((raw - decoded)[:, :12].norm()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("grid", [(3, 5), (16, 16), (1, 7), (24, 9)])
def test_the_dct_of_both_sides_is_the_orthonormal_matrix_of_their_kronecker_product(grid):
    both = []
    for n in grid:
        rows = [[math.cos(math.pi * (2 * i + 1) * k / 2 / n) for i in range(n)] for k in range(n)]
        lengths = [math.sqrt((1 if k == 0 else 2) / n) for k in range(n)]
        both.append(torch.tensor(rows).double() * torch.tensor(lengths).double()[:, None])
    matrix = torch.kron(*both)  # [T, T] float64
    t = len(matrix)
    x = torch.randn(2, t, 8, generator=torch.Generator().manual_seed(0))
    z = dct(x, grid)
    assert torch.allclose(z.double(), matrix @ x.double(), atol=1e-5)
    assert torch.allclose(dct(torch.eye(t), grid).double(), matrix, atol=1e-6)
    assert torch.allclose(inverse_dct(z, grid), x, atol=1e-5)


def test_maps_read_on_another_grid_keep_their_frequencies():
    ramp = np.arange(4)[None, :, None] * 64 + np.zeros((1, 4, 4), dtype=np.int64)
    read = on_grid(ramp, (8, 2))
    assert read.shape == (1, 8, 2) and read[0, :, 0].tolist() == [0, 32, 64, 96, 128, 160, 192, 192]


@pytest.mark.parametrize("grid", [(8, 12), (6, 4), (3, 9)])
def test_squares_over_frequencies_of_another_grid_are_put_back_where_they_are_read(grid):
    smooth = (0.5 * torch.arange(4.0)[:, None] + 0.3 * torch.arange(6.0)).mul(-1).exp2()
    units = (smooth.log2() / 2 * 64).round().to(torch.int64).numpy()[None]
    read = torch.from_numpy(on_grid(units, grid)).double().div(32).exp2().flatten(1)
    back = off_grid(read.float(), grid, GRID).unflatten(1, GRID)[0]
    # a coarser side leaves the last frequencies unread
    inner = back.log2()[:3, :4] - smooth.log2()[:3, :4]
    assert inner.abs().max() < 0.25
    assert torch.equal(off_grid(read.float(), grid, grid), read.float())
    ones = torch.ones(2, grid[0] * grid[1])
    assert torch.allclose(off_grid(ones, grid, GRID), torch.ones(2, 24))


def test_tables_are_of_unit_vectors_of_the_fitted_grid_whatever_grids_the_images_have():
    """White tokens: a unit vector of 96 of them has entries half as large as one of 24."""
    rng = torch.Generator().manual_seed(0)
    small, large = (torch.randn(40, t, 192, generator=rng) for t in (24, 96))
    own = fit(lambda: [(small, GRID)], GRID).tensors
    both = fit(lambda: [(small, GRID), (large, (8, 12))], GRID).tensors
    for name in ("rows", "columns", "statistics"):
        assert own[name].shape == both[name].shape or name == "columns"
        apart = float(both[name].float().mean() - own[name].float().mean())
        assert abs(apart) < 4, name  # in sixteenths of a quarter octave; the shift of grids is 64
    assert abs(transform.tokens_shift(GRID, (8, 12))) == 64


def test_images_too_small_for_a_bucket_of_components_leave_it_to_the_others():
    small, large = some_tokens(3, (1, 2), seed=1), some_tokens(5, seed=2)
    codec = fit(lambda: [(large, GRID), (small, (1, 2))], GRID)
    alone = fit(lambda: [(large, GRID)], GRID)
    assert torch.equal(codec.tensors["starts"], alone.tensors["starts"])
    apart = (codec.tensors["rows"] - alone.tensors["rows"]).float()
    # of components that 2 tokens do not have, only the large images tell; counted among 8, not
    # 5, images their variances would be 21 units lower
    assert apart[2:].mean().abs() < 2 < apart[:2].abs().mean()


# ------------------------------------------------------------------------------ folders


@pytest.fixture(scope="module")
def codec_file(tiny_cache, tmp_path_factory):
    from common import arguments
    from experiments import fit_codec

    path = tmp_path_factory.mktemp("codec") / "tiny.safetensors"
    argv = ["--cache_dir", str(tiny_cache), "--out", str(path)]
    fit_codec.main(arguments.parse(fit_codec.get_args_parser(), argv))
    return path


def test_a_codec_of_a_few_images_says_of_how_many_and_is_another(
    script, tiny_cache, codec_file, tmp_path
):
    out = tmp_path / "few.safetensors"
    flags = ["--cache_dir", tiny_cache, "--out", out, "--images", 3]
    done = script("experiments.fit_codec", *flags)
    assert done.returncode == 0 and "; 3 training images" in done.stdout
    few, whole = Codec.load(out), Codec.load(codec_file)
    assert few.info["images"] == 3 < whole.info["images"]
    assert not torch.equal(few.tensors["rows"], whole.tensors["rows"])


@pytest.fixture
def write(script, tiny_cache, codec_file, tmp_path):
    def run(*flags, codec=codec_file, fails=0):
        where = ["--cache_dir", tiny_cache, "--out", tmp_path / "out", "--exact", "--codec", codec]
        done = script("factorize.py", *where, *flags)
        assert done.returncode == fails, done.stderr
        return done

    return run


@pytest.mark.slow
def test_coded_factors_meet_the_target_as_read_by_every_reader_and_by_workers(
    write, tiny_cache, tmp_path
):
    write("--target_error", 0.2)
    folder, raw = tmp_path / "out", RealQwenVLDataset(tiny_cache)[range(36)].float()
    tokens = load_factors(folder)
    error = (tokens - raw).flatten(1).norm(dim=1) / raw.flatten(1).norm(dim=1)
    assert (error <= 0.2 + 1e-6).all() and error.max() > 0.18
    manifest = json.loads((folder / "manifest.json").read_text())
    mean = manifest["errors"]["rel_error_original"]["mean"]
    assert mean == pytest.approx(float(error.mean()), rel=1e-4)
    read = read_factors(folder, [7, 2])
    assert torch.allclose(read.a @ read.b * read.std + read.mean, tokens[[7, 2]], atol=1e-4)
    data = VisionTokens(folder)
    # to rounding: a library may add in another order where memory is aligned otherwise
    assert len(data) == 36 and torch.allclose(data[35], tokens[35], atol=1e-5)
    loaded = torch.cat(list(DataLoader(data, 5, num_workers=2)))
    assert torch.allclose(loaded, tokens, atol=1e-5)
    with pytest.raises(IndexError):
        data[36]


def test_an_interrupted_run_goes_on_and_its_coded_folder_is_byte_identical(
    write, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_folder, "ROWS_PER_SHARD", 10)
    write("--step", 2)
    whole = hashes(tmp_path / "out")
    assert len(whole) == 6
    calls = []

    def interrupted(*args, coded_image=factorize.coded_image):
        calls.append(1)
        if len(calls) > 25:
            raise KeyboardInterrupt
        return coded_image(*args)

    with monkeypatch.context() as patched:
        patched.setattr(factorize, "coded_image", interrupted)
        write("--step", 2, "--overwrite", fails=130)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert "was begun with" in write("--step", 3, fails=2).stderr
    assert "images are already there" in write("--step", 2).stdout
    assert hashes(tmp_path / "out") == whole


def test_an_image_whose_target_cannot_be_met_is_named_before_anything_is_written(
    write, tiny_cache, tmp_path, monkeypatch
):
    sigma = RealQwenVLDataset(tiny_cache).singular_values.square()
    half = sigma.shape[1] // 2 + 1
    hardest = int((sigma[:, half:].sum(1) / sigma.sum(1)).argmax())
    says = f"row {hardest}: --target_kb 0.01 is out of reach"
    assert says in write("--target_kb", 0.01, fails=2).stderr
    assert not (tmp_path / "out").exists()
    # where the first that are tried meet it, the others still have to
    monkeypatch.setattr(factorize, "check_coded_target", lambda *_: None)
    assert "row 0: --target_kb 0.01 is" in write("--target_kb", 0.01, fails=2).stderr


def test_another_codec_and_damage_are_refused(write, tiny_cache, codec_file, tmp_path):
    write("--step", 2)
    folder = tmp_path / "out"
    shard = folder / "factors-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-50] ^= 16  # of the streams, which come last
    kept = shard.read_bytes()
    shard.write_bytes(content)
    with pytest.raises(InputError, match="row 35: .*checksum"):
        load_factors(folder)
    shard.write_bytes(kept)
    load_factors(folder, [35])
    other = Codec.load(codec_file)
    other.info["log_std"] += 1e-3
    other.save(folder / "codec.safetensors")
    with pytest.raises(InputError, match="another codec"):
        VisionTokens(folder)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--codec needs one of --step, --target_error and --target_kb"),
        (("--step", 1, "--dtype", "int8"), "--dtype does nothing beside --codec"),
        (("--step", 1, "--target_kb", 3), "not allowed with argument"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, says, write):
    assert says in write(*flags, fails=2).stderr


def test_flags_of_coded_factors_need_a_codec(script):
    done = script("factorize.py", "--step", 1)
    assert done.returncode == 2 and "name a --codec" in done.stderr
