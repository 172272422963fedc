"""Tokens of any encoder become a feature cache, from Python and from files."""

import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import TRAIN, manifest_of
from PIL import Image
from safetensors.torch import save_file
from tiny import jpeg, steep_tokens

import lowrank_tokens
from lowrank_tokens import FeatureCache, cache_writer, write_cache
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import read_json


def rectangles(n: int = 20) -> list[dict]:
    """Tokens of two grids, 3 × 4 and 2 × 5, [T, 16]."""
    tall, wide = steep_tokens(n, 12, 16), steep_tokens(n, 10, 16, seed=1)
    return [
        {"tokens": wide[i], "grid": (2, 5)} if i % 3 == 0 else {"tokens": tall[i], "grid": (3, 4)}
        for i in range(n)
    ]


# ----------------------------------------------------------------------------------- from Python


def test_tokens_of_differing_lengths_are_read_as_they_were_written(tmp_path):
    items = rectangles()
    cache = write_cache(tmp_path / "cache", iter(items), encoder_id="my-vit")
    assert len(cache) == 20 and cache.ragged and cache.feature_dim == 16
    assert cache.label == "my-vit, 20 images, T=10 to 12, D=16"
    for i, item in enumerate(items):
        assert cache.grids[i] == item["grid"]
        assert torch.equal(cache[[i]][0], item["tokens"].bfloat16())
    assert cache.verify() == {} and lowrank_tokens.FeatureCache is FeatureCache


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, torch.bfloat16])
def test_arrays_of_every_float_type_are_taken_and_a_square_grid_is_said(dtype, tmp_path):
    tokens = steep_tokens(4, 16, 8)
    if dtype is not torch.bfloat16:
        tokens = tokens.numpy().astype(dtype)
    else:
        tokens = tokens.bfloat16()
    cache = write_cache(tmp_path / "cache", list(tokens), encoder_id="vit")
    (note,) = cache.manifest["notes"]
    assert cache.grid == (4, 4) and "square grid" in note["note"] and note["rows"] == 4
    assert torch.equal(cache[[2]][0], torch.as_tensor(tokens[2]).bfloat16())


def test_images_questions_boxes_and_views_stand_in_the_rows(tmp_path):
    turned, exif = Image.open(io.BytesIO(jpeg(5))), Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    more = {"question": "what?", "answers": ["that"], "bbox": [1, 2, 3, 4], "photograph": "p"}
    more |= {"view": [0, 0, 10, 8], "mirrored": True}
    items = [{"tokens": t, "image": file.getvalue(), **more} for t in steep_tokens(3, 16, 8)]
    cache = write_cache(tmp_path / "cache", items, encoder_id="vit", groups=list("aab"))
    record = cache.image_record(1)
    assert more.items() <= record.items() and record["group"] == "a"
    assert (record["width"], record["height"]) == turned.size[::-1] == cache.thumbnail(0).size
    assert cache.manifest["split_by"] == "group"


def test_equal_images_or_equal_tokens_are_one_group_by_default(tmp_path):
    tokens = steep_tokens(3, 16, 8)
    same = write_cache(tmp_path / "a", [tokens[0], tokens[1], tokens[0]], encoder_id="vit")
    assert [same.rows["group"][0] == same.rows["group"][i] for i in range(3)] == [True, False, True]
    items = [{"tokens": t, "image": jpeg(i % 2)} for i, t in enumerate(tokens)]
    images = write_cache(tmp_path / "b", items, encoder_id="vit").rows["group"].to_pylist()
    assert images[0] == images[2] != images[1]


def test_an_interrupted_call_goes_on_and_gives_the_same_files(tmp_path, monkeypatch):
    items = rectangles(60)

    def cut():
        yield from items[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cache", cut(), encoder_id="vit")
    assert len(list((tmp_path / "cache").glob("part-*"))) == 2  # of 16 rows each
    other = [dict(item, tokens=item["tokens"] + 1) for item in items]
    with pytest.raises(InputError, match="items 0 to 15 are not those"):
        write_cache(tmp_path / "cache", other, encoder_id="vit")
    write_cache(tmp_path / "cache", items, encoder_id="vit")
    write_cache(tmp_path / "whole", items, encoder_id="vit")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes()


def test_items_that_are_not_finite_are_skipped_and_listed(tmp_path):
    tokens = steep_tokens(20, 16, 8)
    tokens[3, 0, 0] = torch.nan
    cache = write_cache(tmp_path / "cache", tokens, encoder_id="vit")
    assert len(cache) == 19 and cache.rows["row_id"].to_pylist()[3] == 4
    assert [entry["row_id"] for entry in cache.manifest["skipped"]] == [3]


def item(**fields):
    return {"tokens": torch.ones(16, 8), **fields}


BAD_ITEMS = {
    "class token": (torch.zeros(197, 8), r"197 tokens, which is no square \(1 more than 14 × 14\)"),
    "no square": (torch.zeros(168, 8), "item 1 has 168 tokens, which is no square: say its grid"),
    "another grid": ({"tokens": torch.zeros(12, 8), "grid": (3, 3)}, "item 1 has 12 tokens"),
    "grid of one number": (item(grid=4), "item 1: grid = 4 is not .rows, columns."),
    "grid of fractions": (item(grid=(4.5, 4)), "item 1: grid = .4.5, 4. is not"),
    "another width": (torch.zeros(16, 9), "item 1 has 9 features, the others have 8"),
    "integers": (torch.zeros(16, 8, dtype=torch.int8), "item 1: its tokens are torch.int8"),
    "objects": (np.array([[None]]), "item 1: its tokens are object, not a float tensor"),
    "pair": ((torch.zeros(16, 8), (4, 4)), "item 1: its tokens are tuple"),
    "four axes": (torch.zeros(1, 2, 16, 8), r"item 1: its tokens are \[1, 2, 16, 8\], not"),
    "unknown key": (item(boxes=1), "unknown key 'boxes'"),
    "box alone": (item(bbox=[1, 2, 3, 4]), "width and height"),
    "box of text": (item(bbox="1 2 3 4"), "item 1: its bbox is '1 2 3 4', not x, y, w, h"),
    "view of three": (item(view=[1, 2, 3]), r"item 1: its view is \[1, 2, 3\], not x, y, w, h"),
    "no image": (item(image=b"text"), "its image cannot be read"),
    "path for image": (item(image="a.jpg"), "its image is 'a.jpg', not the bytes of an image file"),
    "one answer": (item(answers="yes"), "item 1: its answers is 'yes', not a list of texts"),
    "number for answer": (item(answers=[4]), r"item 1: its answers is \[4\], not a list of texts"),
    "number for group": (item(group=3), "item 1: its group is 3, not a text"),
    "fraction of a pixel": (item(width=3.5), "item 1: its width is 3.5, not a whole number"),
}


@pytest.mark.parametrize("kind", BAD_ITEMS)
def test_an_item_that_cannot_be_taken_is_named(kind, tmp_path):
    bad, message = BAD_ITEMS[kind]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        write_cache(tmp_path / "cache", [item(grid=(4, 4)), bad], encoder_id="vit")
    assert "--" not in str(caught.value)
    assert not (tmp_path / "cache" / "manifest.json").exists()


BAD_CALLS = {
    "one item": (item(), {}, TypeError, "items is one item: give a list"),
    "one image's tokens": (torch.ones(16, 8), {}, TypeError, "items is one item: give a list"),
    "nothing": ([], {}, ValueError, "items is empty"),
    "no encoder": ([item()], {"encoder_id": " "}, ValueError, "encoder_id is ' '"),
    "few groups": ([item()] * 2, {"groups": ["a"]}, ValueError, "groups ends before item 1"),
    "many groups": ([item()], {"groups": ["a", "b"]}, ValueError, "groups has more names than"),
    "text for groups": ([item()] * 2, {"groups": "ab"}, TypeError, "groups is 'ab': give one"),
    "number for a group": ([item()], {"groups": [1]}, TypeError, r"groups\[0\] is 1, not a text"),
}


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_an_argument_that_cannot_be_taken_is_named(kind, tmp_path):
    items, options, error, message = BAD_CALLS[kind]
    with pytest.raises(error, match=message):
        write_cache(tmp_path / "cache", items, **{"encoder_id": "vit", **options})
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_square_that_was_not_said_is_warned_of_once(tmp_path):
    items = list(steep_tokens(4, 169, 8))  # a class token and 12 × 14 would be taken for 13 × 13
    with pytest.warns(UserWarning, match="item 0 has no grid: its 169 tokens are taken") as warned:
        write_cache(tmp_path / "cache", items, encoder_id="vit")
    assert len(warned) == 1 and warned[0].filename == __file__


def test_every_row_lies_in_the_shard_that_is_said(tmp_path):
    for size in (1, 3, 16, 20, 100, 128):
        row = 0
        for shard in range(12):
            first, end = (cache_writer.first_row(s, size) for s in (shard, shard + 1))
            assert first == row and 0 < end - first <= size
            assert {cache_writer.shard_of(r, size) for r in range(first, end)} == {shard}
            row = end


# ------------------------------------------------------------------------------------ from files


def read_in(script, tmp_path, *flags):
    folder = tmp_path / "tensors"
    where = ["--import_features", folder, "--cache_dir", tmp_path / "cache"]
    return script("extract_features.py", *where, "--encoder_id", "my-vit", *flags)


def test_files_of_every_kind_are_read_in_the_order_of_their_names(tmp_path, script):
    folder = tmp_path / "tensors"
    folder.mkdir()
    tokens = steep_tokens(9, 16, 8)
    np.save(folder / "part10.npy", tokens[4:6].numpy())  # after part2
    np.save(folder / "part2.npy", tokens[3].numpy())
    torch.save(tokens[0][None], folder / "a.pt")
    torch.save({"x10": tokens[2], "x9": tokens[1]}, folder / "b.pt")
    save_file({"one": tokens[6], "two": tokens[7:9].contiguous()}, folder / "z.safetensors")
    (folder / "notes.txt").write_text("no tensor")
    done = read_in(script, tmp_path)
    assert done.returncode == 0, done.stderr
    cache = FeatureCache(tmp_path / "cache")
    assert torch.equal(cache[range(9)], tokens.bfloat16())
    names = "a.pt b.pt#x9 b.pt#x10 part2.npy part10.npy#0 part10.npy#1 z.safetensors#one"
    assert cache.rows["path"].to_pylist()[:7] == names.split()
    assert "square grid" in done.stdout and "my-vit" in done.stdout


def test_class_tokens_are_dropped_and_a_grid_is_given(tmp_path, script):
    (tmp_path / "tensors").mkdir()
    tokens = steep_tokens(5, 13, 8)
    np.save(tmp_path / "tensors/all.npy", tokens.numpy())
    for flags, says in (
        ([], "13 tokens, which is no square: type --grid H W, or leave out class and register"),
        ([], "by --drop_tokens N (N = 4 leaves 3 x 3)"),
        (["--grid", 3, 4], "all.npy has 13 tokens: --grid 3 4 is of 12; leave out class"),
        (["--drop_tokens", 2], "all.npy has 13 tokens, 11 after --drop_tokens 2, which is no"),
        (["--drop_tokens", 13], "all.npy has 13 tokens: --drop_tokens 13 leaves none"),
    ):
        done = read_in(script, tmp_path, *flags)
        assert done.returncode == 2 and says in done.stderr
    done = read_in(script, tmp_path, "--drop_tokens", 1, "--grid", 3, 4)
    assert done.returncode == 0, done.stderr
    cache = FeatureCache(tmp_path / "cache")
    assert cache.grid == (3, 4) and torch.equal(cache[[1]][0], tokens[1, 1:].bfloat16())


def test_too_few_different_images_leave_no_cache(tmp_path, script):
    (tmp_path / "tensors").mkdir()
    np.save(tmp_path / "tensors/all.npy", steep_tokens(1, 16, 8).expand(8, -1, -1).numpy())
    done = read_in(script, tmp_path)
    assert done.returncode == 2 and "at least 3 different" in done.stderr
    assert not (tmp_path / "cache/manifest.json").exists()


def test_a_network_of_one_cache_serves_another_of_the_same_encoder(tmp_path, script):
    for name, seed in (("cache", 0), ("other", 9)):
        items = list(steep_tokens(12, 16, 40, seed))
        write_cache(tmp_path / name, items, encoder_id="my-vit")
    write_cache(tmp_path / "foreign", items, encoder_id="another-vit")
    results = ["--results_dir", tmp_path / "results"]
    log = ["--log_dir", tmp_path / "log"]
    trained = script(
        "train_real_data.py", "--cache_dir", tmp_path / "cache", *results, *TRAIN, *log
    )
    assert trained.returncode == 0, trained.stderr
    done = script("compare_svd_nn.py", "--cache_dir", tmp_path / "other", *results)
    assert done.returncode == 0, done.stderr
    done = script("compare_svd_nn.py", "--cache_dir", tmp_path / "foreign", *results)
    assert done.returncode == 2 and "encoder.id = my-vit" in done.stderr


def test_the_saliency_head_refuses_imported_tokens_in_words(tmp_path):
    from heads.load_head import load_head
    from qwenvl_dataloader import RealQwenVLDataset

    write_cache(tmp_path / "cache", steep_tokens(6, 16, 8), encoder_id="my-vit")
    with pytest.raises(InputError, match="holds those of my-vit"):
        load_head("saliency", RealQwenVLDataset(tmp_path / "cache"), device="cpu")


def test_channels_that_hold_most_of_the_energy_are_noted(tmp_path, script):
    (tmp_path / "tensors").mkdir()
    tokens = torch.randn(8, 16, 300, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "tensors/all.npy", tokens.numpy())
    assert "of the energy" not in read_in(script, tmp_path).stdout
    tokens[..., [7, 8]] = 1000
    np.save(tmp_path / "tensors/all.npy", tokens.numpy())
    said = read_in(script, tmp_path, "--overwrite").stdout
    named = re.search(r"3 channels \(([\d, ]+)\)", said)[1].split(", ")
    assert {"7", "8"} < set(named) and "hold 100% of the energy" in said
    assert json.dumps(manifest_of(tmp_path / "cache"))
    assert read_json(tmp_path / "cache/manifest.json", "")["kind"] == "imported"
