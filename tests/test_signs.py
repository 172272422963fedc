"""Signs: their box is exact, their text is the wording's, and people could read them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments import demo_signs as signs

SIZES = ((640, 480), (448, 448), (300, 600))  # width, height of a scene


@pytest.fixture(scope="module")
def placed():
    """24 signs on scenes of noise: (change of every pixel [H, W], box)."""
    pairs = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        width, height = SIZES[seed % len(SIZES)]
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, box = signs.place_sign(Image.fromarray(noise), signs.choose_wording(rng), rng)
        pairs.append((np.abs(np.asarray(image, int) - noise).max(axis=2), box))
    return pairs


def test_a_sign_changes_pixels_in_its_box_and_nowhere_else(placed):
    for change, (x, y, w, h) in placed:
        change = change.copy()
        assert change[y : y + h, x : x + w].mean() > 10
        change[y : y + h, x : x + w] = 0
        assert change.max() == 0


def test_a_box_two_pixels_tighter_on_any_side_would_cut_its_sign(placed):
    for change, (x, y, w, h) in placed:
        inside = change[y : y + h, x : x + w]
        for band in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]):
            assert band.max() > 0


def test_a_sign_is_at_least_24_pixels_on_either_side_and_inside_the_scene(placed):
    for change, (x, y, w, h) in placed:
        assert min(w, h) >= 24
        assert x >= 0 and y >= 0 and x + w <= change.shape[1] and y + h <= change.shape[0]


def test_a_pixel_of_a_sign_is_either_visible_or_absent():
    wording = signs.Wording("OPEN", "what does the notice say?", "", "white")
    flat = signs.draw_flat_sign(wording, np.random.default_rng(0))
    alpha = np.asarray(signs.light(flat, 128, np.random.default_rng(1)).getchannel("A"))
    assert {0, 255} < set(alpha.flat)  # and softened edges in between
    assert alpha[alpha > 0].min() >= 16


def test_a_sign_is_brighter_in_bright_surroundings():
    wording = signs.Wording("OPEN", "what does the notice say?", "yellow", "black")
    flat = signs.draw_flat_sign(wording, np.random.default_rng(0))
    dark, bright = (
        np.asarray(signs.light(flat, grey, np.random.default_rng(1)), float) for grey in (0, 255)
    )
    visible = dark[..., 3] == 255
    assert bright[visible][:, :3].mean() > 1.2 * dark[visible][:, :3].mean()


def test_the_text_of_the_wording_is_what_is_drawn():
    one = signs.Wording("TILE", "what does the sign say?", "white", "black")
    other = replace(one, text="TILT")  # one letter differs, at the right of the sign
    first, second = (
        np.asarray(signs.draw_flat_sign(wording, np.random.default_rng(2)), int)
        for wording in (one, other)
    )
    width = min(first.shape[1], second.shape[1])
    change = np.abs(first[:, :width] - second[:, :width]).max(axis=(0, 2))  # per column
    assert change.max() > 100
    assert change[: width // 2].max() == 0


def test_every_text_is_printable_and_every_question_is_filled_in():
    rng = np.random.default_rng(0)
    wordings = [signs.choose_wording(rng) for _ in range(500)]
    assert len({wording.text for wording in wordings}) > 100
    for wording in wordings:
        assert wording.text.strip() == wording.text and wording.text.isascii()
        assert wording.question.endswith("?") and "{" not in wording.question + wording.text


def test_perspective_takes_each_corner_of_the_target_to_its_source():
    target = np.array([[10.0, 20.0], [200.0, 5.0], [190.0, 90.0], [15.0, 80.0]])
    source = np.array([[0.0, 0.0], [300.0, 0.0], [300.0, 100.0], [0.0, 100.0]])
    a, b, c, d, e, f, g, h = signs.perspective_coefficients(target, source)
    x, y = target.T
    scale = g * x + h * y + 1
    mapped = np.stack([(a * x + b * y + c) / scale, (d * x + e * y + f) / scale], axis=1)
    np.testing.assert_allclose(mapped, source, atol=1e-8)


def test_letters_have_the_contrast_that_accessibility_rules_ask_of_text():
    def luminance(colour):  # WCAG 2.1, relative luminance
        c = np.array(signs.COLOURS[colour]) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    for plate, letters in signs.PLATE_LETTERS.items():
        for colour in letters:
            dark, bright = sorted((luminance(plate), luminance(colour)))
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (plate, colour)
