"""Folders of factors as such: images of any grid and rank beside each other."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from lowrank_tokens.exceptions import InputError
from lowrank_tokens.factor_files import (
    DTYPES,
    ERRORS,
    CodedShards,
    FactorWriter,
    StoredImage,
    VisionTokens,
    damaged_files,
    load_factors,
    read_factors,
    read_factors_manifest,
    restore,
    store,
)
from lowrank_tokens.files import file_entry, read_json, write_json

GRIDS = [(4, 4), (2, 3), (2, 3), (3, 2), (1, 7), (4, 4)]
RANKS = [5, 2, 6, 0, 1, 5]
D = 9


def write(folder, dtype):
    """A folder of images of GRIDS and RANKS; what is stored of each, as float32 A, B, mean, std."""
    generator = torch.Generator().manual_seed(0)
    header = {"dtype": dtype, "rank": None, "grid": [4, 4], "num_tokens": 16, "feature_dim": D}
    writer = FactorWriter(folder, header | {"count": len(GRIDS)})
    images, stored = [], []
    for grid, rank in zip(GRIDS, RANKS, strict=True):
        t = grid[0] * grid[1]
        a, b = (torch.randn(s, generator=generator) for s in ((t, rank), (rank, D)))
        mean, std = torch.randn(2, t, 1, generator=generator).unbind()
        kept = store(a, b, dtype)
        images.append(StoredImage(kept, grid, mean, std, dict.fromkeys(ERRORS, 0.1)))
        stored.append((*restore(kept), mean, std))
    writer.write_shard(0, images)
    writer.finish()
    return stored


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_any_grid_and_rank_come_back_as_they_were_stored(dtype, tmp_path):
    stored = write(tmp_path, dtype)
    tokens = VisionTokens(tmp_path)
    assert [tokens.grid_of(row) for row in range(len(tokens))] == GRIDS
    for row, (a, b, mean, std) in enumerate(stored):
        read = read_factors(tmp_path, [row])
        assert read.ranks.tolist() == [RANKS[row]]
        for found, expected in zip(read, (a, b, mean, std), strict=False):
            assert torch.equal(found[0], expected)
        assert torch.allclose(tokens[row], a @ b * std + mean, atol=1e-6)
        assert torch.equal(load_factors(tmp_path, [row])[0], tokens[row])
    loaded = list(DataLoader(tokens, batch_size=None, num_workers=2))
    assert [len(image) for image in loaded] == [h * w for h, w in GRIDS]
    assert all(torch.equal(image, tokens[row]) for row, image in enumerate(loaded))


def test_rows_of_one_grid_stack_padded_to_the_largest_rank_and_others_are_refused(tmp_path):
    stored = write(tmp_path, "float32")
    read = read_factors(tmp_path, [2, 1])
    assert read.a.shape == (2, 6, 6) and read.ranks.tolist() == [6, 2]
    assert torch.equal(read.a[1, :, :2], stored[1][0]) and read.a[1, :, 2:].abs().max() == 0
    assert load_factors(tmp_path, [5, 0]).shape == (2, 16, D)
    for rows in (None, [1, 3]):  # 2 x 3 and 3 x 2 have as many tokens and do not stack either
        for reader in (read_factors, load_factors):
            with pytest.raises(InputError, match="do not stack.*VisionTokens"):
                reader(tmp_path, rows)


@pytest.mark.parametrize("name", ["ranks", "grids", "A_columns", "B_scale", "std"])
def test_a_shard_whose_tables_do_not_fit_its_numbers_is_refused(name, tmp_path):
    write(tmp_path, "int8")
    path = tmp_path / "factors-00000.safetensors"
    whole = load_file(path)
    changes = [whole[name][:-1], whole[name].double()]
    if name in ("ranks", "grids"):
        changes += [whole[name] + 1, -whole[name]]
    for changed in changes:
        save_file(whole | {name: changed}, path)
        manifest = read_json(tmp_path / "manifest.json", "")
        manifest["shards"][0] |= file_entry(path)
        write_json(tmp_path / "manifest.json", manifest)
        with pytest.raises(InputError, match="its manifest says|below 0"):
            VisionTokens(tmp_path)[0]


# ----------------------------------------------------------------------------------------- coded


@pytest.fixture
def coded(made, tmp_path):
    """A folder of 40 coded images to damage."""
    return shutil.copytree(made["coded manifest.json"].folder, tmp_path / "coded")


def test_a_flipped_byte_of_any_stream_refuses_its_image_and_no_other(coded):
    path = coded / "factors-00000.safetensors"
    whole = path.read_bytes()
    clean = CodedShards(coded, read_factors_manifest(coded))
    streams = load_file(path)["streams"].numpy().tobytes()
    first = whole.index(streams)
    sizes = [len(clean.bytes_of(row)) for row in range(40)]
    owners = [row for row, size in enumerate(sizes) for _ in range(size)]
    tokens = [clean.tokens(row) for row in range(40)]
    rng = random.Random(0)
    for at in rng.sample(range(len(streams)), 150):
        flipped = bytearray(whole)
        flipped[first + at] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        shards, row = CodedShards(coded, clean.manifest), owners[at]
        with pytest.raises(InputError, match=rf"row {row}: a coded image is damaged"):
            shards.tokens(row)
        other = (row + rng.randrange(1, 40)) % 40
        assert torch.equal(shards.tokens(other), tokens[other])
        assert damaged_files(coded) == [path.name]


def test_a_missing_or_changed_codec_and_a_shorter_shard_are_refused(coded):
    codec, shard = coded / "codec.safetensors", coded / "factors-00000.safetensors"
    for path, changed, says in (
        (codec, None, "codec.safetensors is missing: put the codec there"),
        (codec, codec.read_bytes()[:-1], "another codec .* or damaged"),
        (shard, shard.read_bytes()[:-1], r"has \d+ bytes, not"),
        (shard, None, "factors-00000.safetensors is missing"),
    ):
        kept = path.read_bytes()
        path.unlink() if changed is None else path.write_bytes(changed)
        for read in (VisionTokens, load_factors, read_factors):
            with pytest.raises(InputError, match=says):
                read(coded)
        path.write_bytes(kept)
    assert damaged_files(coded) == [] and len(VisionTokens(coded)) == 40
