"""What tables and folders hold is checked; what is left out is counted and said."""

import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import manifest_of, picture, write_parquet

from encoders.image_sources import open_source, read_image
from encoders.row_values import check_box
from qwenvl_dataloader import RealQwenVLDataset

# ------------------------------------------------------------------------------------- in tables

BOXES = {
    "a whole box": ([1, 2, 30, 20], [1, 2, 30, 20], None),
    "no box": (None, None, None),
    "an empty box": ([], None, None),
    "a null in it": ([1, None, 3, 4], None, "four finite numbers"),
    "NaN in it": ([1, math.nan, 3, 4], None, "four finite numbers"),
    "two numbers": ([1, 2], None, "four finite numbers"),
    "no area": ([5, 5, 0, 9], None, "without area"),
    "fractions": ([0.1, 0.2, 0.5, 1.0], None, "fractions"),
    "beyond": ([60, 40, 30, 30], [60, 40, 10, 10], "cut to it"),
    "outside": ([200, 10, 5, 5], None, "outside"),
}


@pytest.mark.parametrize("kind", BOXES)
def test_a_box_is_kept_cut_or_left_out_with_a_note(kind):
    box, kept, note = BOXES[kind]
    checked = check_box(box, 70, 50)
    assert checked.box == kept
    assert checked.note is None if note is None else note in checked.note


def test_boxes_and_answers_that_cannot_be_meant_are_counted_and_never_reach_the_cache(
    encode, tmp_path
):
    boxes = [box for box, _, _ in BOXES.values()] + [[5.0, 5.0, 0.0, 9.0]]
    answers = [["a", None], ["b"], None, [None]] + [["c"]] * 7
    columns = {"image": [picture(i) for i in range(11)], "bbox": boxes, "answers": answers}
    types = {"bbox": pa.list_(pa.float64())}
    write_parquet(tmp_path / "set/a.parquet", columns, types)
    done = encode(tmp_path / "set")
    assert done.returncode == 0, done.stderr
    rows = RealQwenVLDataset(tmp_path / "cache").rows
    kept = rows["bbox"].to_pylist()
    assert [box is not None for box in kept] == [k is not None for _, k, _ in BOXES.values()] + [0]
    assert rows["answers"].to_pylist()[:5] == [["a"], ["b"], None, [], ["c"]]
    notes = {entry["note"]: entry for entry in manifest_of(tmp_path / "cache")["notes"]}
    (area,) = (entry for note, entry in notes.items() if "without area" in note)
    assert (area["rows"], area["first_row_id"]) == (2, 6)
    assert "an answer that is null was left out: 2 rows, the first is row 0" in done.stdout


def test_columns_that_are_not_read_are_listed_and_two_of_one_name_are_refused(encode, tmp_path):
    images = [picture(i) for i in range(4)]
    write_parquet(tmp_path / "set/a.parquet", {"image": images, "caption": list("abcd")})
    done = encode(tmp_path / "set")
    assert done.stdout.count("columns that are not read: caption") == 1
    twice = pa.table([pa.array(images), pa.array(images)], names=["image", "image"])
    pq.write_table(twice, tmp_path / "set/a.parquet")
    done = encode(tmp_path / "set", "other")
    assert done.returncode == 2 and "several columns named image" in done.stderr


@pytest.mark.parametrize("name", ["answer", "answers"])
def test_answers_are_read_under_both_names_that_data_sets_give_them(name, tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": [picture(0)], name: [["yes", "no"]]})
    ((_, row),) = next(open_source(tmp_path).batches(1))
    assert row["answers"] == ["yes", "no"]


def test_reading_a_parquet_takes_memory_for_a_batch_not_for_a_row_group(tmp_path):
    images = [os.urandom(1 << 20) for _ in range(64)]
    small_pages = {"row_group_size": 64, "write_batch_size": 1}
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", **small_pages)
    del images
    source, pool, most = open_source(tmp_path), pa.default_memory_pool(), 0
    before = pool.bytes_allocated()
    for batch in source.batches(4):
        most = max(most, pool.bytes_allocated() - before)
        assert len(batch) == 4
    assert most < 24 << 20  # of 64 MiB


# ------------------------------------------------------------------------------------- in folders


def test_every_format_that_pillow_decodes_is_an_image_and_the_rest_is_counted(encode, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    forms = {
        "a.jfif": "JPEG",
        "b.avif": "AVIF",
        "c.jp2": "JPEG2000",
        "d.qoi": "QOI",
        "e.Ppm": "PPM",
    }
    for i, (name, form) in enumerate(forms.items()):
        (folder / name).write_bytes(picture(i, form))
    for name in ("notes.txt", "more.txt", "table.csv", "README"):
        (folder / name).write_text("no image")
    done = encode(folder)
    assert done.returncode == 0, done.stderr
    assert RealQwenVLDataset(tmp_path / "cache").rows["path"].to_pylist() == sorted(forms)
    assert "4 files are no images (2 .txt, 1 .csv, 1 without a suffix)" in done.stdout


def test_links_to_folders_are_followed_once_and_never_for_ever(tmp_path):
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "far/deep/a.png").write_bytes(picture(0))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/deep/up").symlink_to(tmp_path / "photos")
    source = open_source(tmp_path / "photos")
    ((_, row),) = next(source.batches(4))
    assert len(source) == 1 and read_image(row["image"]).size == (70, 50)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").write_bytes(picture(0))
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert "1 folders cannot be read (closed is one)" in open_source(tmp_path).notes[0]


def test_a_file_name_that_is_not_utf8_is_read_and_stored_as_text(encode, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        name = os.fsencode(folder) + b"/caf\xe9%d.png" % i
        with open(name, "wb") as file:
            file.write(picture(i) if i else b"damaged")
    done = encode(folder)
    assert done.returncode == 0, done.stderr
    assert RealQwenVLDataset(tmp_path / "cache").rows["path"][0].as_py() == r"caf\xe91.png"
    assert r"caf\xe90.png: not an image file" in done.stdout
