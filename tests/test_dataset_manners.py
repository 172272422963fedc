"""Feature caches and folders of factors are torch Datasets as a torch user expects them to be."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from tiny import row, steep_tokens
from torch.utils.data import DataLoader

from lowrank_tokens import Codec, FeatureCache, VisionTokens, load_factors, write_cache
from lowrank_tokens.factor_files import (
    CODED,
    ERRORS,
    FactorWriter,
    StoredImage,
    copy_codec,
    store,
)
from lowrank_tokens.linalg import exact_factors, normalise
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real

TOKENS, GRID = steep_tokens(20, 16, 8).bfloat16(), (4, 4)
KINDS = ("memory-mapped", "resident", "factors", "coded")


def write_coded(folder, tokens, grids, codec_path):
    """Write a finished folder of coded tokens, with a codec fitted to the images of the first grid,
    or the one that is there."""
    if not codec_path.exists():
        own = [t for t, grid in zip(tokens, grids, strict=True) if grid == grids[0]]
        Codec.fit([(torch.stack(own), grids[0])]).save(codec_path)
    codec = Codec.load(codec_path)
    images = [codec.coded_image(t, grid, step=0.3) for t, grid in zip(tokens, grids, strict=True)]
    header = {"dtype": CODED, "count": len(tokens), "rank": None, "codec_sha256": codec.sha256}
    header |= {"num_tokens": len(tokens[0]), "feature_dim": tokens[0].shape[1]}
    writer = FactorWriter(folder, header)
    copy_codec(codec_path, folder)
    for shard in writer.shards:
        writer.write_coded(shard, [images[i] for i in writer.rows_of(shard)])
    writer.finish()
    return folder


def write_factors(folder):
    """Write a finished folder of float32 factors of TOKENS, at full rank."""
    x, mean, std = normalise(TOKENS)
    stored = [store(*exact_factors(one, 8), "float32") for one in x]
    header = {"dtype": "float32", "rank": 8, "num_tokens": 16, "feature_dim": 8, "count": 20}
    writer = FactorWriter(folder, header)
    errors = dict.fromkeys(ERRORS, 0.0)
    images = [StoredImage(stored[i], GRID, mean[i], std[i], errors) for i in range(20)]
    writer.write_shard(0, images)
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manners")
    cache = write_cache(folder / "cache", TOKENS, encoder_id="vit").cache_dir
    coded = write_coded(folder / "coded", TOKENS, [GRID] * 20, folder / "codec.safetensors")
    found = {"memory-mapped": cache, "resident": cache, "coded": coded}
    return found | {"factors": write_factors(folder / "factors")}


def opened(folders, kind):
    if kind in ("factors", "coded"):
        return VisionTokens(folders[kind])
    data = FeatureCache(folders[kind])
    if kind == "resident":
        assert data.keep_resident(torch.device("cpu"), share=1)
    return data


@pytest.fixture(params=KINDS)
def data(folders, request):
    return opened(folders, request.param)


@pytest.fixture
def wanted(data):
    """All tokens of `data`, [20, 16, 8], read one by one."""
    tokens = torch.stack([data[i] for i in range(20)])
    assert torch.allclose(tokens.float(), TOKENS.float(), atol=8)
    return tokens


def same(found, wanted):
    """Equal, but for the rounding of products of several images at once."""
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_one_row_is_a_matrix_and_negative_rows_count_from_the_end(data, wanted):
    assert len(data) == 20
    for index in (7, np.int64(7), torch.tensor(7), -13):
        assert torch.equal(data[index], wanted[7])
    for index in (20, -21):
        with pytest.raises(IndexError, match="give 0 to 19"):
            data[index]
        with pytest.raises(IndexError):
            data[[0, index]]


def test_several_rows_are_a_stack_however_they_are_named(data, wanted):
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[3, 19]] = True
    rows = ([3, 19], (3, -1), range(3, 20, 16), torch.tensor([3, 19]), np.array([3, 19]))
    for some in (*rows, mask, mask.numpy(), mask.tolist()):
        assert same(data[some], wanted[[3, 19]])
    assert same(data[-4:], wanted[-4:]) and same(data[::5], wanted[::5])
    assert same(data[[-1]], wanted[[-1]]) and same(data[[3, 3]], wanted[[3, 3]])
    for none in (data[[]], data[5:5], data[mask & False]):
        assert none.shape == (0, 16, 8) and none.dtype == wanted.dtype


def test_what_names_no_rows_is_a_type_error_and_a_mask_of_another_length_an_index_error(data):
    for wrong in ("7", 1.0, None, True, {0, 1}, [0.5], [[0, 1]], ["7"], [True, 1], ...):
        with pytest.raises(TypeError, match="give whole numbers, a slice, or a mask of bools"):
            data[wrong]
    for mask in ([True, False], torch.ones(21, dtype=torch.bool)):
        with pytest.raises(IndexError, match="does not fit the 20"):
            data[mask]


@pytest.mark.parametrize("kind", ["factors", "coded"])
def test_load_factors_takes_the_same_rows(kind, folders):
    mask = np.arange(20) < 2
    every = load_factors(folders[kind])
    for rows in (mask, slice(2), [0, -19], torch.tensor([0, 1])):
        assert torch.equal(load_factors(folders[kind], rows), every[:2])
    with pytest.raises(TypeError, match=r"give a list, such as \[3\]"):
        load_factors(folders[kind], 3)


def test_iterating_ends_after_the_last_row(data, wanted):
    assert torch.equal(torch.stack(list(data)), wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_stacked_batches_though_its_files_were_opened_before_the_fork(
    data, wanted, workers
):
    loader = DataLoader(data, batch_size=8, num_workers=workers)
    for _ in range(2):
        assert same(torch.cat(list(loader)), wanted)
    assert torch.equal(data[7], wanted[7])


def test_it_pickles_without_its_tokens_and_a_spawned_worker_reads_it(data, wanted):
    pickled = pickle.dumps(data)
    assert TOKENS[3].view(torch.int16).numpy().tobytes() not in pickled
    assert torch.equal(pickle.loads(pickled)[3], wanted[3])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory-mapped", "coded"])
def test_spawned_workers_give_the_same_batches(kind, folders):
    data = opened(folders, kind)
    loader = DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="spawn")
    assert same(torch.cat(list(loader)), data[:])


def test_thousands_of_open_readers_of_coded_folders_hold_one_codec_and_no_open_file(
    folders, tmp_path
):
    copies = [shutil.copytree(folders["coded"], tmp_path / str(i)) for i in range(2)]
    files = len(os.listdir("/proc/self/fd"))
    readers = [VisionTokens(copies[i % 2]) for i in range(2000)]
    assert all(torch.equal(reader[3], readers[0][3]) for reader in readers[::10])
    assert len({id(reader._shards.codec) for reader in readers}) == 1
    assert len(os.listdir("/proc/self/fd")) - files < 20
    assert pickle.loads(pickle.dumps(readers[0]))._shards.codec is readers[1]._shards.codec


def test_images_of_several_grids_are_read_one_by_one_or_as_lists(ragged_cache):
    cache = RealQwenVLDataset(ragged_cache)
    assert cache[1].shape == (48, 1536)
    with pytest.raises(ValueError, match="8 × 8 and of 6 × 8 tokens, which do not stack"):
        cache[[0, 1]]
    with pytest.raises(ValueError, match=r"lists=True\) and give the DataLoader collate_fn=list"):
        next(iter(DataLoader(cache, batch_size=4)))
    assert next(iter(DataLoader(cache, batch_size=1))).shape == (1, 64, 1536)
    lists = RealQwenVLDataset(ragged_cache, lists=True)
    batch = next(iter(DataLoader(lists, batch_size=4, collate_fn=list)))
    assert [len(tokens) for tokens in batch] == [64, 48, 64, 20]
    assert all(torch.equal(tokens, cache[i]) for i, tokens in enumerate(batch))


def test_coded_images_of_several_grids_likewise(tmp_path):
    grids = [(4, 4), (3, 4), (4, 4), (4, 3)]
    tokens = [steep_tokens(1, h * w, 48, seed=i)[0] for i, (h, w) in enumerate(grids)]
    folder = write_coded(tmp_path / "coded", tokens, grids, tmp_path / "codec.safetensors")
    data = VisionTokens(folder)
    assert [data.grid_of(i) for i in range(4)] == grids and data[-1].shape == (12, 48)
    for rows in ([0, 1], [1, 3]):  # 3 x 4 and 4 x 3 have as many tokens and do not stack either
        with pytest.raises(ValueError, match="tokens, which do not stack: read them one by one"):
            data[rows]
    with pytest.raises(ValueError, match=r"lists=True\) and give the DataLoader collate_fn=list"):
        next(iter(DataLoader(data, batch_size=4)))
    assert next(iter(DataLoader(data, batch_size=1))).shape == (1, 16, 48)
    loader = DataLoader(VisionTokens(folder, lists=True), batch_size=4, collate_fn=list)
    (batch,) = loader
    assert all(torch.allclose(one, data[i], atol=1e-5) for i, one in enumerate(batch))


def test_the_loaders_of_training_take_whole_batches_at_once(folders, monkeypatch):
    dataset = RealQwenVLDataset(folders["memory-mapped"])
    monkeypatch.setattr(RealQwenVLDataset, "__getitems__", None)  # would raise
    loaders = create_data_loaders_real(dataset, 4)
    assert sum(len(batch.rows) for batch in loaders.train) == len(dataset.split.train)


def test_rows_are_found_by_image_and_by_the_data_sets_row(tmp_path):
    tokens = TOKENS.clone()
    tokens[1, 0, 0] = torch.nan  # skipped: later rows move up
    items = [{"tokens": t, "image": row(i)["thumbnail"]} for i, t in enumerate(tokens[:4])]
    cache = write_cache(tmp_path / "cache", items, encoder_id="vit")
    (sha256,) = set(cache.rows["image_sha256"].to_pylist())
    assert cache.rows_of_image(sha256) == [0, 1, 2] and cache.rows_of_image("0" * 64) == []
    assert cache.row_of_id(2) == 1 and torch.equal(cache[cache.row_of_id(3)], TOKENS[3])
    with pytest.raises(KeyError, match="row 1"):
        cache.row_of_id(1)


def test_loader_speed_reads_all_images_of_each_and_refuses_folders_of_another_cache(
    folders, script, tmp_path
):
    flags = ["--cache_dir", folders["memory-mapped"], "--repeats", 1, "--workers", 0]
    done = script("experiments.loader_speed", *flags, "--coded", folders["coded"])
    assert done.returncode == 0, done.stderr
    kinds = [line.split()[-5:] for line in done.stdout.splitlines()[-2:]]
    assert [kind[0] for kind in kinds] == ["0", "0"] and kinds[0][-1] == "1.000"
    few = write_coded(tmp_path / "few", TOKENS[:3], [GRID] * 3, tmp_path / "codec.safetensors")
    done = script("experiments.loader_speed", *flags, "--coded", few)
    assert done.returncode == 2 and "few has 3 images, not 20" in done.stderr
