"""Own images into a cache: parquet of every kind, folders of images, other models."""

import hashlib
import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import TRAIN, extract, manifest_of, picture, write_parquet
from PIL import Image
from small_checkpoints import save_checkpoint
from transformers import Qwen2Config, Qwen3VLMoeConfig, Siglip2Config

from encoders.checkpoints import FAMILIES
from encoders.image_sources import ImageCell, UnreadableImage, open_source, read_image
from encoders.towers import load_encoder
from qwenvl_dataloader import RealQwenVLDataset

# ------------------------------------------------------------------------------ folders of images


@pytest.fixture
def photos(tmp_path):
    """12 images in formats and folders of several kinds, one of them twice."""
    folder = tmp_path / "photos"
    forms = ["JPEG", "PNG", "WEBP"]
    for i in range(12):
        form = forms[i % 3]
        suffix = {"JPEG": "jpg", "PNG": "PNG", "WEBP": "webp"}[form]
        path = folder / ["", "a", "a/deep"][i % 3] / f"{i:02}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, form))
    shutil.copy(folder / "00.jpg", folder / "z.jpeg")
    (folder / "notes.txt").write_text("not an image")
    (folder / "._00.jpg").write_bytes(b"what another system leaves beside a file")
    return folder


def test_a_folder_of_images_is_read_recursively_in_sorted_order(photos, encode, tmp_path):
    done = encode(photos)
    assert done.returncode == 0, done.stderr
    dataset = RealQwenVLDataset(tmp_path / "cache")
    paths = dataset.rows["path"].to_pylist()
    assert len(paths) == 13 and paths == sorted(paths) and paths[0] == "00.jpg"
    assert {"a/01.PNG", "a/deep/02.webp", "z.jpeg"} < set(paths)
    hashes = dataset.rows["image_sha256"].to_pylist()
    assert hashes == [hashlib.sha256((photos / p).read_bytes()).hexdigest() for p in paths]
    assert dataset.rows["group"].to_pylist() == hashes  # so both copies are in one part
    assert torch.equal(dataset[[paths.index("00.jpg")]], dataset[[paths.index("z.jpeg")]])
    assert dataset.manifest["split_by"] == "image" and dataset.manifest["kind"] == "real"
    record = dataset.image_record(0)
    assert record["question"] is record["answers"] is record["bbox"] is None
    assert "13, of 12 different images" in done.stdout


@pytest.mark.slow
def test_a_folder_of_images_can_be_trained_on_compared_and_drawn(photos, encode, tmp_path, script):
    assert encode(photos).returncode == 0
    where = ["--cache_dir", tmp_path / "cache", "--results_dir", tmp_path / "results"]
    log = ["--log_dir", tmp_path / "log"]
    for name, *flags in (
        ("train_real_data.py", *TRAIN, *log),
        ("compare_svd_nn.py",),
        ("visualize_svd_nn.py", "--image_idx", 2),
    ):
        done = script(name, *where, *flags)
        assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results/ResMLP/svd_nn_comparison.json").read_text())
    assert results["n_images"] and "box_precision" not in results["readers"]["full"]
    drawn = json.loads((tmp_path / "results/ResMLP/image_2_comparison_results.json").read_text())
    assert drawn["question"] is None


def test_a_folder_without_images_and_parquet_is_refused_with_what_was_looked_for(encode, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    done = encode(tmp_path / "empty")
    assert done.returncode == 2 and done.stderr.startswith("error: --dataset_dir")
    assert all(word in done.stderr for word in ("*.parquet", "data/*.parquet", ".jpg", ".webp"))
    assert not (tmp_path / "cache").exists()


def test_parquet_files_win_over_images_beside_them_and_the_script_says_so(photos, encode, tmp_path):
    rows = {"image": [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)]}
    write_parquet(photos / "data" / "train-00000-of-00001.parquet", rows)
    done = encode(photos)
    assert done.returncode == 0 and "13 image files: the rows are the parquet's" in done.stdout
    assert len(RealQwenVLDataset(tmp_path / "cache")) == 3


# ----------------------------------------------------------------------------------------- parquet


def image_columns(folder: Path) -> dict[str, tuple[list, pa.DataType | None]]:
    """The same five images in each form that an image column can have."""
    data = [picture(i) for i in range(5)]
    for place in ("data/images", "images2"):
        (folder / place).mkdir(parents=True)
        for i, d in enumerate(data):
            (folder / place / f"{i}.png").write_bytes(d)
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return {
        "struct": ([{"bytes": d, "path": "x.png"} for d in data], cell),
        "struct of paths": ([{"bytes": None, "path": f"images/{i}.png"} for i in range(5)], cell),
        "bytes": (data, pa.binary()),
        "large bytes": (data, pa.large_binary()),
        "beside the parquet": ([f"images/{i}.png" for i in range(5)], None),
        "below the data set": ([f"images2/{i}.png" for i in range(5)], pa.large_string()),
        "absolute": ([str(folder / f"images2/{i}.png") for i in range(5)], None),
    }


def test_an_image_column_of_every_form_gives_the_same_features(encode, tmp_path):
    seen = []
    for form, (cells, kind) in image_columns(tmp_path / "set").items():
        write_parquet(tmp_path / "set/data/a.parquet", {"image": cells}, {"image": kind})
        done = encode(tmp_path / "set", "cache", "--overwrite")
        assert done.returncode == 0, (form, done.stderr)
        dataset = RealQwenVLDataset(tmp_path / "cache")
        assert dataset.manifest["skipped"] == [], form
        seen.append((dataset[range(5)], dataset.rows["image_sha256"].to_pylist()))
    assert len(seen) == 7
    assert all(torch.equal(x, seen[0][0]) and hashes == seen[0][1] for x, hashes in seen)


def test_only_the_demos_own_images_are_called_demo_data(tmp_path, tiny_cache, capsys):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    extract(tmp_path, tmp_path, tmp_path / "cache")
    said = capsys.readouterr().out
    dataset = RealQwenVLDataset(tmp_path / "cache")
    assert "DEMO" not in said and not dataset.is_demo and dataset.manifest["kind"] == "real"
    assert dataset.label.startswith("demo encoder demo-dinov2")
    assert RealQwenVLDataset(tiny_cache).label.startswith("DEMO data, demo-dinov2")


def test_no_path_of_a_data_set_leads_out_of_it(encode, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(9))
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for i in range(4):
        (folder / "images" / f"{i}.png").write_bytes(picture(i))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")  # the user's own doing
    paths = [f"images/{i}.png" for i in range(3)] + ["../images/3.png", "link.png"]
    out = ["../secret.png", "../../secret.png", str(tmp_path / "secret.png"), "images/../../a.png"]
    write_parquet(folder / "data/a.parquet", {"image": paths + out})
    done = encode(folder)
    assert done.returncode == 0, done.stderr
    skipped = RealQwenVLDataset(tmp_path / "cache").manifest["skipped"]
    assert [entry["row_id"] for entry in skipped] == [5, 6, 7, 8]
    for entry, path in zip(skipped, out, strict=True):
        assert path in entry["reason"] and "leads outside the data set" in entry["reason"]


def test_rows_of_several_files_stand_in_file_order_with_what_each_says(encode, tmp_path):
    for k in range(3):
        rows = range(4 * k, 4 * k + 4)
        columns = {
            "image": [{"bytes": picture(i), "path": f"{i}.png"} for i in rows],
            "question": [f"question {i}" for i in rows],
            "answer": [[f"answer {i}", "another"] for i in rows],
            "bbox": [[i, 1, 10, 20] for i in rows],
            "dataset_id": [str(i) for i in rows],
        }
        write_parquet(tmp_path / f"set/data/train-{k:05}-of-00003.parquet", columns)
    # batches of 3 rows of files of 4: the last of each file is short
    assert encode(tmp_path / "set", "cache", "--batch_size", 3).returncode == 0
    dataset = RealQwenVLDataset(tmp_path / "cache")
    assert dataset.rows["row_id"].to_pylist() == list(range(12))
    assert dataset.rows["question"].to_pylist() == [f"question {i}" for i in range(12)]
    record = dataset.image_record(9)
    assert record["answers"] == ["answer 9", "another"] and record["bbox"] == [9, 1, 10, 20]
    assert record["image_sha256"] == hashlib.sha256(picture(9)).hexdigest()
    assert (record["width"], record["height"]) == (79, 50)


def test_rows_need_no_column_but_image_and_an_answer_may_be_one_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": [picture(0)], "answer": ["yes"]})
    ((row_id, row),) = next(open_source(tmp_path).batches(4))
    assert row_id == 0 and row["answers"] == ["yes"] and row.keys() == {"image", "answers"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b""], "question": [""]}, "no column image, only picture, question"),
        ({"image": [3]}, "column image is of type int64"),
        ({"image": [{"data": b""}]}, "column image is of type struct<data"),
        ({"image": [b""], "bbox": ["1,2,3,4"]}, "column bbox is of type string"),
        ({"image": [b""], "answer": [[1]]}, "column answer is of type list"),
        ({"image": [b""], "question": [7]}, "column question is of type int64"),
        ({"image": [b""], "group": [7]}, "column group is of type int64"),
    ],
)
def test_a_column_that_is_missing_or_of_another_type_is_named(columns, message, encode, tmp_path):
    write_parquet(tmp_path / "set" / "a.parquet", columns)
    done = encode(tmp_path / "set")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr and "set/a.parquet" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_files_with_different_columns_are_refused(encode, tmp_path):
    write_parquet(tmp_path / "set/a.parquet", {"image": [b""], "question": ["?"]})
    write_parquet(tmp_path / "set/b.parquet", {"image": [b""]})
    done = encode(tmp_path / "set")
    assert done.returncode == 2 and "b.parquet has the columns image, " in done.stderr


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_half_written_parquet_file_is_named(keep, encode, tmp_path):
    write_parquet(tmp_path / "set/a.parquet", {"image": [picture(0)]})
    write_parquet(tmp_path / "set/b.parquet", {"image": [picture(1)]})
    data = (tmp_path / "set/b.parquet").read_bytes()
    (tmp_path / "set/b.parquet").write_bytes(data[: int(keep * len(data))])
    done = encode(tmp_path / "set")
    assert done.returncode == 2 and "set/b.parquet is damaged" in done.stderr


def test_a_parquet_file_damaged_in_the_middle_is_named(encode, tmp_path):
    write_parquet(tmp_path / "set/a.parquet", {"image": [picture(i) for i in range(9)]})
    data = bytearray((tmp_path / "set/a.parquet").read_bytes())
    data[4:400] = bytes(396)
    (tmp_path / "set/a.parquet").write_bytes(data)
    done = encode(tmp_path / "set")
    assert done.returncode == 2 and "set/a.parquet is damaged" in done.stderr


# -------------------------------------------------------------------------------- unreadable images


def bomb() -> bytes:
    """A PNG that claims 60000 x 60000 pixels in 70 bytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    body = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + chunk + body


def unreadable() -> dict[str, tuple[ImageCell, str]]:
    whole = picture(0)
    return {
        "nothing": (ImageCell(None, None), "no image bytes and no path"),
        "empty": (ImageCell(b"", None), "not an image file"),
        "text": (ImageCell(b"<html>", "page.jpg"), "page.jpg: not an image file"),
        "truncated": (ImageCell(whole[: len(whole) // 2], None), "truncated"),
        "bomb": (ImageCell(bomb(), None), "decompression bomb"),
        "missing": (ImageCell(None, "no/such.jpg", (Path("."),)), "no/such.jpg: no such file"),
        "folder": (ImageCell(None, ".", (Path("."),)), "no such file"),
    }


@pytest.mark.parametrize("kind", unreadable())
def test_an_unreadable_image_says_why_in_words_that_are_the_same_in_every_run(kind):
    cell, reason = unreadable()[kind]
    said = set()
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=reason) as error:
            read_image(cell)
        said.add(str(error.value))
    assert len(said) == 1 and " object at 0x" not in said.pop()


def test_unreadable_rows_are_skipped_counted_and_listed(encode, tmp_path):
    cells = [picture(0), None, b"text", bomb(), picture(1)]
    write_parquet(tmp_path / "set/a.parquet", {"image": cells, "question": list("abcde")})
    done = encode(tmp_path / "set")
    assert done.returncode == 2 and "at least 3" in done.stderr  # two readable: no split
    cells += [picture(2), picture(3)]
    write_parquet(tmp_path / "set/a.parquet", {"image": cells, "question": list("abcdefg")})
    done = encode(tmp_path / "set", "cache", "--overwrite")
    assert done.returncode == 0 and "3 skipped" in done.stdout
    dataset = RealQwenVLDataset(tmp_path / "cache")
    assert dataset.rows["question"].to_pylist() == list("aefg")
    assert dataset.rows["row_id"].to_pylist() == [0, 4, 5, 6]
    assert [entry["row_id"] for entry in dataset.manifest["skipped"]] == [1, 2, 3]
    assert "decompression bomb" in dataset.manifest["skipped"][2]["reason"]


def test_many_unreadable_rows_are_a_few_lines_and_a_count(encode, tmp_path):
    cells = [picture(i) for i in range(4)] + [b"no"] * 20
    write_parquet(tmp_path / "set/a.parquet", {"image": cells})
    done = encode(tmp_path / "set")
    assert done.stdout.count("skipped row ") == 5 and "and 15 more" in done.stdout
    assert len(manifest_of(tmp_path / "cache")["skipped"]) == 20


# ------------------------------------------------------------------------------------ other models


@pytest.mark.parametrize("config", [Qwen3VLMoeConfig, Siglip2Config, Qwen2Config])
def test_a_checkpoint_of_another_family_is_refused_by_its_real_config(
    config, photos, qwen, tmp_path, script
):
    folder = Path(shutil.copytree(qwen, tmp_path / "other"))
    config().save_pretrained(folder)
    done = script("extract_features.py", "--dataset_dir", photos, "--model", folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"model_type {config.model_type!r} is not supported" in done.stderr
    assert all(family.example in done.stderr for family in FAMILIES.values())


@pytest.mark.parametrize(
    ("family", "grid", "width"), [("qwen3_vl", 7, 48), ("siglip", 14, 32), ("dinov2", 16, 32)]
)
def test_a_checkpoint_of_another_family_makes_a_cache_of_its_own_grid(
    family, grid, width, photos, encode, tmp_path
):
    folder = save_checkpoint(tmp_path / "small", family)
    done = encode(photos, "cache", "--model", folder, "--image_size", 224, "--batch_size", 5)
    assert done.returncode == 0, done.stderr
    dataset = RealQwenVLDataset(tmp_path / "cache")
    assert (dataset.grid, dataset.num_tokens) == ((grid, grid), grid**2)
    assert dataset.feature_dim == width and dataset.manifest["encoder"]["id"] == "small"
    encoder = load_encoder(str(folder), device="cpu", image_size=224)
    image = Image.open(photos / dataset.image_record(1)["path"])
    expected = encoder.encode(encoder.preprocess(image)[None])[0].to(torch.bfloat16)
    assert torch.allclose(dataset[[1]][0].float(), expected.float(), rtol=0.01, atol=0.01)


def test_padding_changes_features_of_oblong_images_only(encode, tmp_path):
    square = io.BytesIO()
    Image.open(io.BytesIO(picture(1))).resize((60, 60)).save(square, "PNG")
    cells = [picture(0), square.getvalue(), picture(2)]
    write_parquet(tmp_path / "set/a.parquet", {"image": cells})
    for rule in ("stretch", "pad"):
        assert encode(tmp_path / "set", rule, "--resize", rule).returncode == 0
    stretched, padded = (RealQwenVLDataset(tmp_path / rule) for rule in ("stretch", "pad"))
    assert padded.manifest["resize"] == "pad"
    same = [torch.equal(stretched[[i]], padded[[i]]) for i in range(3)]
    assert same == [False, True, False]
