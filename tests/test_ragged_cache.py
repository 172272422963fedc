"""Feature caches of images with grids of their own: reading, batches, singular values, damage."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import edit_manifest, manifest_of
from safetensors import safe_open
from safetensors.torch import save_file

from lowrank_tokens import cache as spectra
from lowrank_tokens.errors import optimum
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import file_entry
from lowrank_tokens.linalg import exact_singular_values, normalise
from qwenvl_dataloader import EpochSampler, RealQwenVLDataset, create_data_loaders_real


def test_an_image_of_any_grid_is_read_as_it_was_written_mapped_and_resident(ragged_cache):
    square = RealQwenVLDataset(ragged_cache.parent / "square")
    lazy, resident = RealQwenVLDataset(ragged_cache), RealQwenVLDataset(ragged_cache)
    assert resident.keep_resident(torch.device("cpu"))
    assert lazy.ragged and lazy.grid == (8, 8) and lazy.num_tokens == 64
    assert lazy.grids == [tiny.GRIDS[i % 5] for i in range(36)]
    assert lazy.label.endswith("36 images, T=20 to 64, D=1536")
    for row, (rows, columns) in enumerate(lazy.grids):
        expected = square[[row]].unflatten(1, (8, 8))[:, :rows, :columns].flatten(1, 2)
        assert torch.equal(lazy[[row]], expected) and torch.equal(resident[[row]], expected)
    together = [3, 28, 8]  # of one grid
    assert torch.equal(lazy[together], torch.cat([lazy[[row]] for row in together]))
    assert torch.equal(resident[together], lazy[together])
    for dataset in (lazy, resident):
        with pytest.raises(ValueError, match="do not stack"):
            dataset[[1, 4]]  # 48 tokens each, but 6 × 8 and 8 × 6


def test_batches_hold_images_of_one_grid_and_an_epoch_every_image_once(ragged_cache):
    dataset = RealQwenVLDataset(ragged_cache)
    loaders = create_data_loaders_real(dataset, 4)
    for part, loader in zip(
        (dataset.split.train, dataset.split.val, dataset.split.test), loaders, strict=True
    ):
        batches = list(loader)
        assert len(batches) == len(loader)
        seen = torch.cat([batch.rows for batch in batches])
        assert sorted(seen.tolist()) == part.tolist()
        assert sum(batch.images for batch in batches) == loader.num_images
        for batch in batches:
            assert {dataset.grids[row] for row in batch.rows} == {batch.grid}
            assert torch.equal(batch.x, normalise(dataset[batch.rows])[0])
            assert batch.singular_values.shape[1] == min(batch.x.shape[1:])
            assert torch.allclose(batch.singular_values, exact_singular_values(batch.x), atol=1e-4)
    # results batch after batch stand in the order that the loader tells
    test = loaders.test
    assert test.sampler.rows.tolist() == torch.cat([batch.rows for batch in test]).tolist()


def test_an_epoch_of_several_grids_can_be_entered_anywhere_and_is_shared_without_loss():
    rows, grids = torch.arange(5, 40), [(2, 2 + i % 3) for i in range(50)]
    whole = EpochSampler(rows, 6, shuffle_seed=1, grids=grids)
    whole.epoch = 2
    steps = [share.rows for share in whole.shares()]
    assert len(steps) == len(whole) == 6 and sorted(sum(steps, [])) == rows.tolist()
    shares = [EpochSampler(rows, 3, 1, (rank, 2), grids) for rank in range(2)]
    for sampler in shares:
        sampler.epoch = 2
    for step, *parts in zip(steps, *(s.shares() for s in shares), strict=True):
        assert sum((part.rows for part in parts if part.share), []) == step
        assert sum(part.share for part in parts) == pytest.approx(1)
    whole.start = 4
    assert list(whole) == steps[4:] and whole.images_before == sum(map(len, steps[:4]))
    # the order is not sorted by grid: training would see one after another
    assert len({grids[step[0]] for step in steps[:4]}) > 1
    # of one grid it is what it would be without grids
    one = [(2, 2)] * 50
    assert list(EpochSampler(rows, 4, 7, grids=one)) == list(EpochSampler(rows, 4, 7))


def test_spectra_are_computed_at_first_need_and_go_on_where_they_were_cut(
    ragged_cache, tmp_path, monkeypatch
):
    cache = Path(shutil.copytree(ragged_cache, tmp_path / "cache"))
    (cache / spectra.SPECTRA_FILE).unlink(missing_ok=True)
    monkeypatch.setattr(spectra, "IMAGES_PER_PART", 7)
    assert not RealQwenVLDataset(cache).spectra_are_known
    write = spectra._write

    def cut(path, *rest):
        if path.name == "spectra-00003.safetensors":
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(spectra, "_write", cut)
        RealQwenVLDataset(cache).singular_values  # noqa: B018
    left = sorted(path.name for path in cache.glob("spectra-*"))
    assert left == [f"spectra-{i:05d}.safetensors" for i in range(3)]
    damaged = cache / left[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    computed = []
    monkeypatch.setattr(spectra, "_write", lambda p, *a: computed.append(p.name) or write(p, *a))
    dataset = RealQwenVLDataset(cache)
    sigma = dataset.singular_values
    assert computed == [f"spectra-0000{i}.safetensors" for i in (1, 3, 4, 5)] + [
        spectra.SPECTRA_FILE
    ]
    assert sorted(path.name for path in cache.glob("spectra*")) == [spectra.SPECTRA_FILE]
    assert sigma.shape == (36, 64) and RealQwenVLDataset(cache).spectra_are_known
    for row, grid in enumerate(dataset.grids):
        m = grid[0] * grid[1]
        exact = torch.linalg.svdvals(normalise(dataset[[row]])[0].double())[0]
        assert torch.allclose(sigma[row, :m], exact, atol=1e-5 * float(exact[0]))
        assert not sigma[row, m:].any()
        assert optimum(sigma[row], 8) == pytest.approx(float(optimum(exact, 8)), rel=1e-6)
    assert RealQwenVLDataset(cache).verify() == {}


def test_of_several_that_ask_for_spectra_at_once_one_computes(ragged_cache, tmp_path, monkeypatch):
    cache = Path(shutil.copytree(ragged_cache, tmp_path / "cache"))
    (cache / spectra.SPECTRA_FILE).unlink(missing_ok=True)
    (cache / ".spectra-00000.safetensors.7.tmp").write_bytes(b"torn")  # another run was killed
    write, written = spectra._write, []
    monkeypatch.setattr(spectra, "_write", lambda p, *a: written.append(p.name) or write(p, *a))
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(lambda: RealQwenVLDataset(cache).singular_values) for _ in range(3)]
        found = [future.result() for future in asked]
    assert written == [f"spectra-0000{i}.safetensors" for i in range(3)] + [spectra.SPECTRA_FILE]
    assert all(torch.equal(sigma, found[0]) for sigma in found)
    assert [path.name for path in cache.glob(".spectra*")] == [".spectra.lock"]


def test_spectra_of_damaged_features_are_refused_with_the_row(ragged_cache, tmp_path):
    cache = Path(shutil.copytree(ragged_cache, tmp_path / "cache"))
    (cache / spectra.SPECTRA_FILE).unlink(missing_ok=True)
    with safe_open(cache / "features-00000.safetensors", framework="pt") as shard:
        features = shard.get_tensor("features")
    features[64 + 48 + 5] = torch.nan  # of the third image
    save_file({"features": features}, cache / "features-00000.safetensors")
    dataset = RealQwenVLDataset(cache)
    with pytest.raises(InputError, match="row 2 are not finite"):
        dataset.singular_values  # noqa: B018
    with pytest.raises(InputError, match="row 2 are not finite"):
        dataset.keep_resident(torch.device("cpu"))
    assert dataset[[1, 6]].isfinite().all()
    assert list(dataset.verify()) == ["features-00000.safetensors"]


def test_spectra_of_other_features_are_not_taken(ragged_cache, tmp_path):
    cache = Path(shutil.copytree(ragged_cache, tmp_path / "cache"))
    sigma = RealQwenVLDataset(cache).singular_values
    shards = manifest_of(cache)["shards"]
    edit_manifest(cache, shards=[{**shards[0], "sha256": "0" * 64}, *shards[1:]])
    assert not RealQwenVLDataset(cache).spectra_are_known
    assert torch.equal(RealQwenVLDataset(cache).singular_values, sigma)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["grid_rows"]), "no column grid_rows"),
        (lambda t: put_grid(t, 0), "row 0 has the grid"),
        (lambda t: put_grid(t, None), "row 0 has the grid"),
        (lambda t: put_grid(t, 7), "its manifest says"),
    ],
)
def test_grids_that_do_not_fit_the_features_are_refused(ragged_cache, tmp_path, change, message):
    cache = Path(shutil.copytree(ragged_cache, tmp_path / "cache"))
    rows = cache / "rows.parquet"
    pq.write_table(change(pq.read_table(rows)), rows)
    edit_manifest(cache, rows=file_entry(rows))
    with pytest.raises(InputError, match=message):
        RealQwenVLDataset(cache)[[0]]


def put_grid(table, side):
    sides = pa.array([side, *table["grid_rows"].to_pylist()[1:]], pa.int32())
    return table.set_column(table.column_names.index("grid_rows"), "grid_rows", sides)
