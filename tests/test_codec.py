"""The codec of vision tokens: what is read is what was written, everywhere, or it is refused."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import hashes
from tiny import steep_tokens
from torch.utils.data import DataLoader

import factorize
from common.codecs import codec_for_cache
from lowrank_tokens import shards as shard_folder
from lowrank_tokens import transform
from lowrank_tokens.cache_writer import write_cache
from lowrank_tokens.codec import Codec
from lowrank_tokens.entropy import (
    CODED_FROM,
    HIGHEST,
    LEVELS,
    LOWEST,
    SymbolReader,
    Tables,
    encode_symbols,
)
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import VisionTokens, load_factors, read_factors
from lowrank_tokens.linalg import normalise
from lowrank_tokens.stream import FORMS
from lowrank_tokens.transform import OFFSETS, dct, inverse_dct, level_offsets, off_grid, on_grid
from qwenvl_dataloader import RealQwenVLDataset

GRID = (4, 6)
by_form = pytest.mark.parametrize("form", FORMS)


def some_tokens(n, grid=GRID, seed=0):
    """[n, T, 48] raw tokens with a spread of means and lengths."""
    tokens = steep_tokens(n, grid[0] * grid[1], seed=seed)
    rng = torch.Generator().manual_seed(seed)
    scale = (0.3 * torch.randn(n, tokens.shape[1], 1, generator=rng)).exp()
    return tokens * scale + 0.2 * torch.randn(n, tokens.shape[1], 1, generator=rng)


@pytest.fixture(scope="module")
def codec():
    return Codec.fit(of_grid(some_tokens(64).split(5)))


def of_grid(batches, grid=GRID):
    """Return what `fit` takes: batches of raw tokens, each with its grid."""
    return [(batch, grid) for batch in batches]


def raw_error(raw, decoded):
    return float((raw - decoded).norm() / raw.norm())


def test_offsets_are_those_of_the_fewest_bits_and_make_an_image_smaller(codec):
    rng = np.random.default_rng(0)
    levels = rng.integers(-10, 28, (300, 7))
    q = np.rint(rng.normal(size=(300, 7)) * 2.0 ** ((levels + 5) / 4)).astype(np.int64)
    tables = Tables.of_mixture()
    found = level_offsets(q, levels, tables)

    def bits(offset):
        rows = np.clip(levels + offset, LOWEST, HIGHEST) - LOWEST
        return tables.bits[rows, np.minimum(abs(q), 256)].sum(0)

    least = np.min([bits(o) + abs(o) for o in OFFSETS], axis=0)
    assert np.allclose([bits(o)[k] + abs(o) for k, o in enumerate(found)], least, rtol=1e-5)
    assert ((found >= 3) & (found <= 7)).all()
    sizes = []
    for offsets in (OFFSETS, [0]):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(transform, "OFFSETS", offsets)
            sizes.append(sum(len(codec.encode(x, GRID, step=0.2)) for x in some_tokens(8, seed=8)))
    assert sizes[0] < sizes[1]


def test_no_value_is_clipped_and_the_bytes_are_those_that_the_tables_promise():
    rng = np.random.default_rng(0)
    tables = Tables.of_mixture()
    assert tables.bits.shape[0] == LEVELS and tables.frequencies.min() >= 1
    levels = rng.integers(LOWEST - 4, HIGHEST + 1, 20_000)
    symbols = np.rint(rng.normal(size=20_000) * 2.0 ** (levels / 4)).astype(np.int64)
    symbols[levels < CODED_FROM] = 0
    levels[:3] = HIGHEST
    symbols[:3] = 10**9, -(10**9), 12345
    data = encode_symbols(
        [(symbols[:5000], levels[:5000]), (symbols[5000:], levels[5000:])], tables
    )
    reader = SymbolReader(data, tables)
    assert np.array_equal(reader.read(levels[:5000]), symbols[:5000])
    assert np.array_equal(reader.read(levels[5000:]), symbols[5000:])
    coded = levels >= CODED_FROM
    bits = tables.bits[levels[coded] - LOWEST, np.minimum(abs(symbols[coded]), 256)]
    assert abs(8 * len(data) / bits.sum() - 1) < 0.01
    with pytest.raises(ValueError, match="not coded"):
        encode_symbols([(np.ones(1, int), np.full(1, LOWEST))], tables)


@by_form
@pytest.mark.parametrize("grid", [GRID, (4, 4), (1, 7), (9, 8), (12, 3)])
def test_any_grid_is_decoded_and_a_finer_step_errs_less(codec, grid, form):
    raw = some_tokens(1, grid, seed=1)[0]
    errors, sizes, streams = [], [], []
    for step in (2.0, 0.5, 0.1, 0.02):
        streams.append(codec.encode(raw, grid, step=step, form=form))
        header = codec.header(streams[-1])
        assert header.grid == grid and header.form == form
        assert abs(math.log2(header.step / step)) <= 1 / 128 + 1e-9
        errors.append(raw_error(raw, codec.decode(streams[-1])))
        sizes.append(len(streams[-1]))
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    assert errors[-1] < 0.02
    for data, tokens in zip(streams, codec.decode_batch(streams), strict=True):
        assert torch.allclose(tokens, codec.decode(data), atol=1e-4)


def test_images_of_several_grids_and_forms_are_decoded_in_one_batch(codec):
    streams = [
        codec.encode(some_tokens(1, grid, seed=i)[0], grid, step=0.3, form=form)
        for i, (grid, form) in enumerate(
            [(GRID, "factors"), ((1, 7), "transform"), (GRID, "transform"), (GRID, "factors")]
        )
    ]
    found = codec.decode_batch(streams)
    for data, tokens in zip(streams, found, strict=True):
        assert torch.allclose(tokens, codec.decode(data), atol=1e-4)
    with pytest.raises(InputError, match=r"streams\[1\]: a coded image is damaged"):
        codec.decode_batch([streams[0], streams[1][:-4]])


def test_tokens_are_the_factors_with_the_statistics_and_the_rank_is_what_the_step_leaves(codec):
    raw = some_tokens(1, seed=2)[0]
    ranks = []
    for step in (2.0, 0.2):
        data = codec.encode(raw, GRID, step=step)
        a, b, mean, std = codec.factors(data)
        assert torch.allclose((a @ b) * std[:, None] + mean[:, None], codec.decode(data), atol=1e-4)
        ranks.append(a.shape[1])
        assert codec.header(data).rank == a.shape[1]
    assert 0 < ranks[0] < ranks[1]
    with pytest.raises(InputError, match="transform has no factors"):
        codec.factors(codec.encode(raw, GRID, step=1.0, form="transform"))


def test_factors_from_outside_are_coded_as_the_exact_ones(codec):
    raw = some_tokens(1, seed=3)[0]
    u, s, vh = torch.linalg.svd(normalise(raw)[0], full_matrices=False)
    given = codec.decode(codec.encode(raw, GRID, step=0.3, factors=(u, s, vh.mT)))
    exact = codec.decode(codec.encode(raw, GRID, step=0.3))
    # the exact ones are of tokens normalised by the statistics as stored
    assert raw_error(raw, given) < 1.3 * raw_error(raw, exact) + 0.03


@by_form
def test_constant_tokens_are_coded_at_rank_0(codec, form):
    raw = torch.full((24, 48), 3.0)
    data = codec.encode(raw, GRID, step=1.0, form=form)
    assert codec.header(data).rank == 0
    assert raw_error(raw, codec.decode(data)) < 0.05
    assert raw_error(raw, codec.decode_batch([data])[0]) < 0.05


def test_a_codec_is_read_as_it_was_saved_and_a_flipped_byte_of_it_is_found(codec, tmp_path):
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    raw = some_tokens(1, seed=5)[0]
    read = Codec.load(path)
    assert (read.sha256, read.identity) == (codec.sha256, codec.identity)
    assert read.encode(raw, GRID, step=0.5) == codec.encode(raw, GRID, step=0.5)
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        Codec.load(path)


def test_another_codec_refuses_a_stream_and_a_refit_reads_it(codec):
    """A stream of another codec of one width gave finite garbage."""
    raw = some_tokens(1, seed=5)[0]
    data = codec.encode(raw, GRID, step=0.5)
    again = Codec.fit(of_grid(some_tokens(64).split(5)), info={"data": "said otherwise"})
    assert again.identity == codec.identity
    assert torch.equal(again.decode(data), codec.decode(data))
    other = Codec.fit(of_grid(some_tokens(64, seed=1).split(5)))
    for read in (other.decode, other.factors, lambda d: other.decode_batch([d])):
        with pytest.raises(InputError, match="written with another codec"):
            read(data)


def test_no_codec_is_overwritten_by_another_unless_it_is_asked_for(codec, tmp_path):
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    codec.save(path)  # itself
    other = Codec.fit(of_grid(some_tokens(16, seed=1).split(5)))
    with pytest.raises(InputError, match="holds another codec"):
        other.save(path)
    assert Codec.load(path).identity == codec.identity
    other.save(path, overwrite=True)
    assert Codec.load(path).identity == other.identity


def test_the_codecs_of_two_encoders_have_files_of_their_own_and_none_is_replaced(script, tmp_path):
    """The second cache's codec took the file of the first, codecs/real.safetensors."""
    for name, encoder, seed in (("a", "x/one", 0), ("b", "x/two", 1), ("c", "x/one", 2)):
        items = [{"tokens": tokens, "grid": (4, 4)} for tokens in steep_tokens(12, seed=seed)]
        write_cache(tmp_path / name, items, encoder_id=encoder)
    fit = [script("experiments.fit_codec", "--cache_dir", tmp_path / name) for name in "abc"]
    assert [done.returncode for done in fit] == [0, 0, 2]
    assert "holds another codec" in fit[2].stderr and "--overwrite" in fit[2].stderr
    names = sorted(path.name for path in (tmp_path / "codecs").iterdir())
    assert names == ["one.safetensors", "two.safetensors"]


@by_form
def test_a_target_is_met_nearly_and_one_out_of_reach_is_refused(codec, form, monkeypatch):
    raw = some_tokens(1, seed=6)[0]
    tries = []
    rounded = Codec._rounded
    monkeypatch.setattr(Codec, "_rounded", lambda *a: tries.append(1) or rounded(*a))
    for target in (0.3, 0.1, 0.05):
        tries.clear()
        image = codec.coded_image(raw, GRID, error=target, form=form)
        assert 0.92 * target <= image.errors["rel_error_original"] <= target
        assert image.errors["rel_error_original"] == pytest.approx(
            raw_error(raw, codec.decode(image.data)), rel=1e-4
        )
        assert len(tries) <= 6
    by_size = codec.encode(raw, GRID, max_bytes=300, form=form)
    assert 270 <= len(by_size) <= 300
    with pytest.raises(InputError, match="error = 1e-09 is out of reach, the least is 0.00"):
        codec.encode(raw, GRID, error=1e-9, form=form)
    with pytest.raises(InputError, match="max_bytes = 10 is out of reach, the least is 4"):
        codec.encode(raw, GRID, max_bytes=10, form=form)


def test_tokens_and_arguments_that_cannot_be_coded_are_refused_by_name(codec):
    """One NaN gave 20 bytes that decoded to zeros; steps of 0 and below were taken."""
    raw = some_tokens(1)[0]
    for value in (math.nan, math.inf, -math.inf):
        bad = raw.clone()
        bad[3, 5] = value
        with pytest.raises(InputError, match="tokens have NaN or infinite"):
            codec.encode(bad, GRID, step=1.0)
    for step in (0.0, -1.0, math.nan, "1"):
        with pytest.raises(InputError, match="step = .* is not a finite number above 0"):
            codec.encode(raw, GRID, step=step)
    for step in (1e-19, 1e30):  # an IndexError of numpy, and zeros
        with pytest.raises(InputError, match="step = .* is out of range"):
            codec.encode(raw, GRID, step=step)
    with pytest.raises(InputError, match=r"tokens \[24, 40\] are not \[T, 48\]"):
        codec.encode(raw[:, :40], GRID, step=1.0)
    with pytest.raises(InputError, match="grid of 5 x 5 does not fit 24 tokens"):
        codec.encode(raw, (5, 5), step=1.0)
    with pytest.raises(InputError, match="one of step, error and max_bytes"):
        codec.encode(raw, GRID)
    with pytest.raises(TypeError, match="tokens have to be"):
        codec.encode(raw.numpy(), GRID, step=1.0)
    with pytest.raises(TypeError, match="batches can be read only once"):
        Codec.fit(iter(of_grid([raw[None]])))


@by_form
def test_numbers_of_numpy_and_torch_a_list_as_a_grid_and_tokens_with_gradient_are_taken(
    codec, form
):
    raw = some_tokens(1)[0]
    for name in ("step", "error", "max_bytes"):
        value = {"step": 0.25, "error": 0.125, "max_bytes": 500.0}[name]
        wanted = codec.encode(raw, GRID, form=form, **{name: value})
        for same in (np.float32(value), np.float64(value), torch.tensor(value), np.array(value)):
            data = codec.encode(raw.clone().requires_grad_(), list(GRID), form=form, **{name: same})
            assert data == wanted
    assert codec.encode(raw, GRID, step=np.int64(2)) == codec.encode(raw, torch.Size(GRID), step=2)
    for grid in ((4.0, 6), 24, (4, 6, 1), None):
        with pytest.raises(InputError, match="is not .rows, columns. in whole numbers"):
            codec.encode(raw, grid, step=1.0)


@by_form
def test_all_products_of_a_batch_are_done_on_the_device_that_is_asked_for(codec, form):
    """The DCT's matrices stayed on the CPU. The meta device refuses to mix, as CUDA does."""
    raw = some_tokens(2, seed=3)
    streams = [codec.encode(one, GRID, step=0.3, form=form) for one in raw]
    found = codec.decode_batch(streams, device="meta")
    assert [one.device.type for one in found] == ["meta"] * 2
    assert [one.shape for one in found] == [one.shape for one in raw]


@by_form
def test_tokens_in_other_units_take_the_same_bytes_at_the_same_error(form):
    """The mean's step was 0.05 raw units: tokens of a small scale could not be coded."""
    rng = torch.Generator().manual_seed(0)
    tokens = steep_tokens(257, 24, 192)
    tokens = tokens / tokens.std(-1, keepdim=True)
    tokens = tokens + 0.25 * torch.randn(257, 24, 1, generator=rng)
    found = []
    for factor in (1, 1 / 8, 0.03, 8, 64):  # by 0.03 no step brought the error below 0.196
        scaled = tokens * factor
        codec = Codec.fit([(scaled[:-1], GRID)])
        data = codec.encode(scaled[-1], GRID, step=0.5, form=form)
        found.append((len(data), raw_error(scaled[-1], codec.decode(data))))
    sizes, errors = zip(*found, strict=True)
    assert max(sizes) / min(sizes) < 1.005
    assert max(errors) - min(errors) < 1e-3 and max(errors) < 0.2


def test_tokens_whose_every_varied_channel_is_extreme_are_coded():
    """No direction was left of them: an IndexError in fitting."""
    tokens = steep_tokens(257, 24, 192)
    tokens[..., 3:] = 0
    codec = Codec.fit([(tokens[:-1], GRID)])
    assert raw_error(tokens[-1], codec.decode(codec.encode(tokens[-1], GRID, step=1))) < 0.01


def outlying(tokens, touched):
    """Error over the entries that are not `touched` of the last image at 1200 bytes; the codec."""
    codec = Codec.fit([(tokens[:-1], GRID)])
    data = codec.encode(tokens[-1], GRID, max_bytes=1200)
    assert len(data) > 1150
    apart = (tokens[-1] - codec.decode(data))[~touched]
    return float(apart.norm() / tokens[-1][~touched].norm()), codec


def test_extreme_entries_of_a_token_do_not_drown_its_other_channels():
    """Two channels of 3 tokens at +300 and −180: the others came back with error 1.42."""
    tokens = steep_tokens(33, 24, 384)
    touched = torch.zeros(24, 384, dtype=torch.bool)
    touched[[2, 9, 17], 5] = touched[[2, 9, 17], 200] = True
    codec = Codec.fit([(tokens[:-1], GRID)])
    raw = tokens[-1].bfloat16().float()
    clean = codec.encode(raw, GRID, step=1.0)
    hit = raw.clone()
    hit[[2, 9, 17], 5], hit[[2, 9, 17], 200] = 2400.0, -1440.0
    data = codec.encode(hit, GRID, step=1.0)
    decoded = codec.decode(data)
    assert torch.equal(decoded[touched], hit[touched])
    rows = torch.tensor([2, 9, 17])

    def error(of, tokens, rows):
        kept = ~touched[rows]
        return float((of - tokens)[rows][kept].norm() / tokens[rows][kept].norm())

    others = torch.tensor([t for t in range(24) if t not in (2, 9, 17)])
    assert error(decoded, hit, rows) < 1.2 * error(decoded, hit, others) + 0.02
    assert len(data) <= 1.06 * len(clean) + 32
    assert codec.header(clean).extremes is None  # nothing extreme: not one byte more


def test_channels_that_are_always_large_do_not_drown_the_others():
    """Two channels × 1000 in every token: the others had error 1.13 at the target."""
    plain = steep_tokens(33, 24, 384)
    large = plain.clone()
    large[..., [7, 300]] *= 1000
    touched = torch.zeros(24, 384, dtype=torch.bool)
    touched[:, [7, 300]] = True
    (error, codec), (large_error, large_codec) = (outlying(t, touched) for t in (plain, large))
    assert large_error < 1.2 * error
    assert "channel_exponents" not in codec.tensors
    assert large_codec.tensors["channel_exponents"].count_nonzero() == 2


def test_in_a_metric_the_features_that_count_err_less():
    weight = torch.ones(48, dtype=torch.float64)
    weight[:12] = 25
    raw = some_tokens(1, seed=7)[0]
    errors = []
    for metric in (None, torch.diag(weight)):
        codec = Codec.fit(of_grid(some_tokens(24).split(8)), metric=metric)
        decoded = codec.decode(codec.encode(raw, GRID, max_bytes=400))
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
    own = Codec.fit([(small, GRID)]).tensors
    both = Codec.fit([(small, GRID), (large, (8, 12))]).tensors
    for name in ("rows", "columns", "statistics"):
        assert own[name].shape == both[name].shape or name == "columns"
        apart = float(both[name].float().mean() - own[name].float().mean())
        assert abs(apart) < 4, name  # in sixteenths of a quarter octave; the shift of grids is 64
    assert transform.tokens_shift(GRID, (8, 12)) == -64 == -transform.tokens_shift((8, 12), GRID)
    for fitted, grid in ((GRID, (5, 7)), ((3, 3), (31, 2))):
        exact = 32 * math.log2(fitted[0] * fitted[1] / grid[0] / grid[1])
        assert transform.tokens_shift(fitted, grid) == round(exact)


def test_images_too_small_for_a_bucket_of_components_leave_it_to_the_others():
    small, large = some_tokens(3, (1, 2), seed=1), some_tokens(5, seed=2)
    codec = Codec.fit([(large, GRID), (small, (1, 2))])
    alone = Codec.fit([(large, GRID)])
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

    def interrupted(*args, coded_image=Codec.coded_image, **more):
        calls.append(1)
        if len(calls) > 25:
            raise KeyboardInterrupt
        return coded_image(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Codec, "coded_image", interrupted)
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
    says = f"row {hardest}: --target_kb: max_bytes = 10 is out of reach"
    assert says in write("--target_kb", 0.01, fails=2).stderr
    assert not (tmp_path / "out").exists()
    # where the first that are tried meet it, the others still have to
    monkeypatch.setattr(factorize, "check_coded_target", lambda *_: None)
    assert "row 0: --target_kb: max_bytes = 10 is" in write("--target_kb", 0.01, fails=2).stderr


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
    other.info["data"] = "another"
    other.save(folder / "codec.safetensors")
    with pytest.raises(InputError, match="another codec"):
        VisionTokens(folder)


def test_a_codec_of_another_size_or_encoder_is_refused_unless_that_encoder_is_accepted(
    codec_file, tiny_cache, tmp_path
):
    cache, path = RealQwenVLDataset(tiny_cache), tmp_path / "other.safetensors"
    Codec.fit(of_grid(some_tokens(8)[..., :20].split(4))).save(path)
    with pytest.raises(InputError, match=f"is of 20 features, .* has {cache.feature_dim}"):
        codec_for_cache(path, cache, accept_other_encoder=True)
    info = {"encoder": {"id": "another"}}
    Codec(Codec.load(codec_file).tensors, info).save(path, overwrite=True)
    with pytest.raises(InputError, match="was fitted to encoder another, .*: fit one with .*, or"):
        codec_for_cache(path, cache, otherwise=", or so")
    assert codec_for_cache(path, cache, accept_other_encoder=True).info == info


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
