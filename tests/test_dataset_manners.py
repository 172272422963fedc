"""A feature cache is a torch Dataset as a torch user expects one to be."""

import pickle

import numpy as np
import pytest
import torch
from tiny import row, steep_tokens
from torch.utils.data import DataLoader

from lowrank_tokens import FeatureCache, write_cache
from qwenvl_dataloader import RealQwenVLDataset, create_data_loaders_real

TOKENS = steep_tokens(20, 16, 8).bfloat16()
KINDS = {"lazy": False, "resident": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cache(
        tmp_path_factory.mktemp("manners") / "cache", TOKENS, encoder_id="vit"
    ).cache_dir


@pytest.fixture(params=KINDS)
def cache(folder, request):
    cache = FeatureCache(folder)
    if KINDS[request.param]:
        assert cache.keep_resident(torch.device("cpu"), share=1)
    return cache


def test_one_row_is_a_matrix_and_negative_rows_count_from_the_end(cache):
    for index in (7, np.int64(7), torch.tensor(7), -13):
        assert torch.equal(cache[index], TOKENS[7])
    for index in (20, -21):
        with pytest.raises(IndexError, match="give 0 to 19"):
            cache[index]
        with pytest.raises(IndexError):
            cache[[0, index]]


def test_several_rows_are_a_stack_however_they_are_named(cache):
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[3, 19]] = True
    for rows in ([3, 19], (3, -1), torch.tensor([3, 19]), np.array([3, 19]), mask, mask.numpy()):
        assert torch.equal(cache[rows], TOKENS[[3, 19]])
    assert torch.equal(cache[-4:], TOKENS[-4:])
    assert torch.equal(cache[::5], TOKENS[::5])
    assert torch.equal(cache[[-1]], TOKENS[[-1]])
    assert cache[[]].shape == cache[5:5].shape == (0, 16, 8)
    with pytest.raises(TypeError):
        cache["7"]
    with pytest.raises(TypeError):
        cache[1.0]


def test_iterating_ends_after_the_last_row(cache):
    assert torch.equal(torch.stack(list(cache)), TOKENS)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_stacked_batches(cache, workers):
    loader = DataLoader(cache, batch_size=8, num_workers=workers)
    assert torch.equal(torch.cat(list(loader)), TOKENS)


def test_it_pickles_and_a_spawned_worker_reads_it(cache):
    assert torch.equal(pickle.loads(pickle.dumps(cache))[3], TOKENS[3])
    loader = DataLoader(cache, batch_size=8, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader)), TOKENS[:8])


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


def test_the_loaders_of_training_take_whole_batches_at_once(folder, monkeypatch):
    dataset = RealQwenVLDataset(folder)
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
