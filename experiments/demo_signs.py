"""Signs: what they say, how they look, and how one is set into a photograph.

    wording = choose_wording(rng)
    image, bbox = place_sign(scene, wording, rng)  # the scene with the sign, and the sign's box

A sign is drawn flat, turned in space, lit like its surroundings and pasted. Everything random
comes from the generator that is passed in.

Legend: (x, y) pixels, x runs right and y down from the top left corner of the scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lowrank_tokens.files import locate

MIN_BOX_SIDE = 24  # pixels; smaller lettering is lost at 448 x 448
SUPERSAMPLE = 2  # the sign is warped at this multiple of its final size, then averaged
FONT_PIXELS = 110  # size at which the lettering is drawn before it is warped
VISIBLE_ALPHA = 16  # of 255: fainter edges of a sign are cut off, so that the box is exact

PixelBox = tuple[int, int, int, int]  # x, y, w, h


# --- what the signs say ---------------------------------------------------------------------

# kind of text -> (texts, questions that suit the kind); {n}, {m}, {h}, {c} are drawn anew
TEXTS = {
    "shop": (
        "BAKERY,Golden Lion,Cafe Luna,OLD MILL,Blue Door,PHARMACY,Rosa & Sons,BOOKS,Fresh Fish,"
        "Hotel Astra,FLORIST,Green Leaf,TAILOR,Pizza Roma,THE ANCHOR,Sunrise Deli,BARBER,"
        "Noodle Bar,Record Shop,Harbour Grill,Toy Corner,LAUNDRY",
        ("what is the name of this place?", "What does the shop sign say?"),
    ),
    "street": (
        "Mill Lane,OAK STREET,Station Road,ELM AVENUE,King Street,RIVER WALK,Church Hill,"
        "Market Square,{m}0TH STREET,Bridge Street,HARBOUR WAY,Park Row,Castle Road,West End",
        ("what street is this?", "which street name is on the sign?"),
    ),
    "warning": (
        "STOP,DANGER,NO PARKING,KEEP OUT,WET PAINT,CAUTION,NO ENTRY,HIGH VOLTAGE,MIND THE GAP,"
        "SLOW,NO SMOKING,BEWARE OF DOG,PRIVATE,HARD HAT AREA,KEEP CLEAR,ONE WAY",
        ("What does the warning say?", "what warning is given here?"),
    ),
    "direction": (
        "EXIT {n},PLATFORM {m},GATE {c}{m},TAXI,TICKETS,ROOM {n}{m},MUSEUM,AIRPORT,BUS {n},LIFT,"
        "TOILETS,LEVEL {m},ZONE {c},INFO,PARKING {c},TRAILHEAD {m}",
        ("what does the sign point out?", "What is written on the direction sign?"),
    ),
    "notice": (
        "OPEN 9-5,OPEN 24H,SALE {n}%,CLOSED,{h}:30 - 18:00,FOR RENT,SOLD,MENU,2 FOR 1,PUSH,PULL,"
        "OPEN UNTIL {h},NOW HIRING,{m}.99 EACH",
        ("what does the notice say?", "What information does the notice give?"),
    ),
    "number": (
        "{n},{n}{m},{m}{n}{m},No. {n},{c}{n}",
        ("which number is on the sign?", "What number is shown?"),
    ),
}
PLATE_QUESTIONS = (
    "What is written on the {colour} plate?",
    "what does the {colour} sign say?",
    "what text is on the {colour} sign?",
    "What does the sign with {letters} letters say?",
)
BARE_QUESTIONS = (
    "What do the {letters} letters say?",
    "what is written in {letters}?",
    "which text is painted in {letters}?",
)

COLOURS = {
    "white": (242, 241, 235),
    "yellow": (246, 203, 32),
    "orange": (240, 135, 30),
    "blue": (20, 66, 150),
    "green": (12, 94, 58),
    "red": (178, 24, 34),
    "brown": (92, 56, 34),
    "black": (24, 24, 27),
}
# plate -> letters; every pair has a contrast ratio of at least 4.5 (WCAG 2.1, level AA)
PLATE_LETTERS = {
    "white": ("black", "blue", "red", "green"),
    "yellow": ("black", "blue"),
    "orange": ("black",),
    "blue": ("white", "yellow"),
    "green": ("white", "yellow"),
    "red": ("white",),
    "brown": ("white", "yellow"),
    "black": ("white", "yellow", "orange"),
}
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "DejaVuSansMono"),
    *("DejaVuSansMono-Bold", "STIXGeneralBol", "STIXGeneralBolIta"),
)


@dataclass(frozen=True)
class Wording:
    """The text of a sign, how it looks, and what is asked about it."""

    text: str
    question: str
    plate: str  # a colour, or "" for bare lettering
    letters: str  # a colour


def choose_wording(rng: np.random.Generator) -> Wording:
    """Choose a short plausible text in colours that stand out, and a question it answers."""
    texts, questions = TEXTS[_pick(rng, tuple(TEXTS))]
    text = _pick(rng, texts.split(",")).format(
        n=rng.integers(10, 100), m=rng.integers(1, 10), h=rng.integers(6, 12), c=_pick(rng, "ABCD")
    )
    if rng.random() < 0.75:
        plate = _pick(rng, tuple(PLATE_LETTERS))
        letters, by_colour = _pick(rng, PLATE_LETTERS[plate]), PLATE_QUESTIONS
    else:
        plate, by_colour = "", BARE_QUESTIONS
        letters = _pick(rng, ("white", "yellow", "black", "red", "blue"))
    question = _pick(rng, questions if rng.random() < 0.45 else by_colour)
    return Wording(text, question.format(colour=plate, letters=letters), plate, letters)


# --- how the signs are drawn ----------------------------------------------------------------


def place_sign(
    scene: Image.Image, wording: Wording, rng: np.random.Generator
) -> tuple[Image.Image, PixelBox]:
    """Return a copy of the scene (RGB) with the sign on it, and the tight box of its pixels."""
    flat = draw_flat_sign(wording, rng)
    layer, (x, y) = warp(flat, place_corners(flat.size, scene.size, rng))
    around = scene.crop((x, y, x + layer.width, y + layer.height)).convert("L")
    layer = light(layer, float(np.asarray(around).mean()), rng)
    image = scene.copy()
    image.paste(layer, (x, y), layer)
    left, top, right, bottom = layer.getchannel("A").getbbox()
    return image, (x + left, y + top, right - left, bottom - top)


def draw_flat_sign(wording: Wording, rng: np.random.Generator) -> Image.Image:
    """Draw the sign seen from the front, RGBA, lettering of FONT_PIXELS, transparent margin."""
    file = locate("matplotlib", f"matplotlib/mpl-data/fonts/ttf/{_pick(rng, FONTS)}.ttf")
    # the basic layout engine: the other one depends on libraries of the machine
    font = ImageFont.truetype(file, FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)
    two_lines = len(wording.text) > 7 and rng.random() < 0.4
    text = _break_in_two(wording.text) if two_lines else wording.text
    stroke = 0 if wording.plate else 9
    style = {"font": font, "align": "center", "spacing": FONT_PIXELS // 4, "stroke_width": stroke}
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox(
        (0, 0), text, **style
    )
    # lettering without a plate needs no room around it beyond the transparent margin
    pad_x, pad_y = (rng.integers(26, 60), rng.integers(20, 44)) if wording.plate else (0, 0)
    margin = 8  # transparent, so that warping leaves smooth edges
    width, height = math.ceil(right - left + 2 * pad_x), math.ceil(bottom - top + 2 * pad_y)
    letters = _jitter(COLOURS[wording.letters], rng)
    # where alpha is 0 the colour is that of the rim: no dark fringe after averaging
    sign = Image.new("RGBA", (width + 2 * margin, height + 2 * margin), (*letters, 0))
    draw = ImageDraw.Draw(sign)
    if wording.plate:
        radius = _pick(rng, (0, 0, 14, 30, height // 3))
        rim = (margin, margin, margin + width - 1, margin + height - 1)
        draw.rounded_rectangle(rim, radius, fill=(*_jitter(COLOURS[wording.plate], rng), 255))
        if rng.random() < 0.7:  # a line in the letters' colour, a little inside the rim
            inset, line = 7, int(rng.integers(3, 7))
            inner = (rim[0] + inset, rim[1] + inset, rim[2] - inset, rim[3] - inset)
            draw.rounded_rectangle(inner, max(radius - inset, 0), outline=letters, width=line)
    outline = COLOURS["black" if wording.letters in ("white", "yellow") else "white"]
    origin = (margin + pad_x - left, margin + pad_y - top)
    draw.multiline_text(origin, text, fill=letters, stroke_fill=outline, **style)
    return sign


def place_corners(
    flat: tuple[int, int], scene: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Place the sign's corners in the scene, [4, 2] float64 pixels, clockwise from the top left.

    The flat sign is turned in space (roll, pitch, yaw), seen by a pinhole camera, scaled to a
    letter size of some 5 to 12 per cent of the scene's longer side, fitted, and put anywhere.
    """
    w, h = flat
    roll, pitch, yaw = np.radians(rng.normal(0, (6, 9, 20)).clip((-15, -22, -40), (15, 22, 40)))
    cos, sin = np.cos, np.sin
    turn_z = np.array([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, cos(pitch), -sin(pitch)], [0, sin(pitch), cos(pitch)]])
    turn_y = np.array([[cos(yaw), 0, sin(yaw)], [0, 1, 0], [-sin(yaw), 0, cos(yaw)]])
    plane = np.array([[-w, -h, 0], [w, -h, 0], [w, h, 0], [-w, h, 0]]) / 2
    space = plane @ (turn_z @ turn_x @ turn_y).T  # [4, 3]
    distance = 2.5 * max(w, h)
    corners = space[:, :2] * distance / (distance + space[:, 2:])  # [4, 2]
    corners -= corners.min(axis=0)
    extent = corners.max(axis=0)

    room = np.array(scene) - 6.0
    scale = math.exp(rng.uniform(math.log(0.05), math.log(0.12))) * max(scene) / FONT_PIXELS
    scale = max(scale, 1.5 * MIN_BOX_SIDE / extent.min())  # the margin and faint edges go
    scale = min(scale, *(room * (0.85, 0.7) / extent))
    return corners * scale + 3 + rng.uniform(0, 1, 2) * (room - extent * scale)


def perspective_coefficients(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return (a, ..., h), float64 [8], for PIL: source = ((ax+by+c), (dx+ey+f)) / (gx+hy+1).

    `target` and `source` are four matching points each, [4, 2]: an 8 x 8 linear system.
    """
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows, dtype=np.float64), np.array(values, dtype=np.float64))


def warp(flat: Image.Image, corners: np.ndarray) -> tuple[Image.Image, tuple[int, int]]:
    """Warp the flat sign onto `corners` [4, 2]: RGBA layer, and the scene pixel of its corner."""
    origin = np.floor(corners.min(axis=0)).astype(int) - 1
    size = np.ceil(corners.max(axis=0)).astype(int) + 1 - origin
    w, h = flat.size
    source = np.array([[0, 0], [w, 0], [w, h], [0, h]], dtype=np.float64)
    coefficients = perspective_coefficients((corners - origin) * SUPERSAMPLE, source)
    fine = flat.transform(
        tuple(int(n) for n in size * SUPERSAMPLE),
        Image.Transform.PERSPECTIVE,
        tuple(float(c) for c in coefficients),
        Image.Resampling.BICUBIC,
    )
    layer = fine.resize(tuple(int(n) for n in size), Image.Resampling.BOX)
    return layer, (int(origin[0]), int(origin[1]))


def light(layer: Image.Image, surroundings: float, rng: np.random.Generator) -> Image.Image:
    """Return the layer in the scene's light: brightness, a gradient, slight blur and sensor noise.

    `surroundings` is the mean grey value of the scene around the sign, 0 to 255. Alpha below
    VISIBLE_ALPHA becomes 0.
    """
    # blurred with premultiplied alpha, so that transparent pixels do not bleed in
    blurred = layer.convert("RGBa").filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    pixels = np.asarray(blurred.convert("RGBA")).astype(np.float64)  # [h, w, 4]
    gain = np.clip(0.72 + 0.35 * surroundings / 255 + rng.normal(0, 0.04), 0.65, 1.1)
    slope = np.linspace(-1, 1, pixels.shape[1])[None, :, None] * rng.uniform(-0.1, 0.1)
    noise = rng.normal(0, rng.uniform(1, 6), (*pixels.shape[:2], 1))
    pixels[..., :3] = pixels[..., :3] * (gain + slope) + noise
    pixels[..., 3] *= pixels[..., 3] >= VISIBLE_ALPHA
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8), "RGBA")


def _pick(rng: np.random.Generator, choices: Sequence) -> Any:
    """Draw one of `choices`, all equally likely."""
    return choices[rng.integers(len(choices))]


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, ...]:
    """Return the colour, a few grey values lighter or darker."""
    return tuple(int(n) for n in (np.array(colour) + rng.integers(-8, 9)).clip(0, 255))


def _break_in_two(text: str) -> str:
    """Return `text` with the space nearest its middle turned into a line break, if it has one."""
    spaces = [i for i, letter in enumerate(text) if letter == " "]
    if not spaces:
        return text
    at = min(spaces, key=lambda i: abs(i - len(text) / 2))
    return f"{text[:at]}\n{text[at + 1 :]}"
