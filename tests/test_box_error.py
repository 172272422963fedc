"""Error inside and outside the answer's box: which tokens are meant, and what is said of them."""

import pytest
import torch

from heads.box_error import box_report, part_errors
from lowrank_tokens.errors import rel_error
from lowrank_tokens.grids import tokens_in_box
from svd_baseline import truncated_svd


def covered(box, grid=(4, 4)):
    return tokens_in_box(box, grid).nonzero().flatten().tolist()


def test_a_box_covers_the_tokens_whose_cells_share_area_with_it():
    assert covered((0.25, 0.5, 0.5, 0.25)) == [9, 10]  # exactly two cells, no neighbour
    assert covered((0.24, 0.5, 0.5, 0.25)) == [8, 9, 10]
    assert covered((0.3, 0.55, 0.01, 0.01)) == [9]  # smaller than a cell
    assert covered((0.3, 0.4, 0.1, 0.2), (4, 2)) == [2, 4]  # rows differ from columns
    assert covered((0, 0, 1, 1)) == list(range(16))


def test_corners_that_meet_an_edge_of_the_grid_but_for_rounding_cover_no_further_token():
    third = 0.1 + 0.2  # 0.30000000000000004
    assert covered((0, 0, third, third), (10, 10)) == [
        10 * i + j for i in range(3) for j in range(3)
    ]


@pytest.mark.parametrize("box", [None, (0.3, 0.3, 0, 0.2), (1.2, 0, 0.5, 0.5), (-0.5, 0, 0.5, 1)])
def test_no_box_an_empty_one_and_one_beside_the_image_cover_no_token(box):
    assert covered(box) == []


def test_part_errors_are_those_of_the_parts_as_matrices_of_their_own(tokens):
    a, b = truncated_svd(tokens, 5)
    inside = torch.zeros(3, 24, dtype=torch.bool)
    inside[0, 3:7] = inside[1, [0, 23]] = inside[2, 1:] = True
    errors = part_errors(tokens, a, b, inside)
    for i in range(3):
        for part, mask in (("inside", inside[i]), ("outside", ~inside[i])):
            expected = rel_error(tokens[i, mask], a[i, mask], b[i])
            assert torch.allclose(errors[part][i], expected, rtol=1e-6)


def test_the_squares_of_both_parts_add_up_to_the_image_s_error(tokens):
    a, b = truncated_svd(tokens, 5)
    inside = torch.arange(24).expand(3, 24) < 7
    errors = part_errors(tokens, a, b, inside)
    energy = tokens.double().square().sum(-1)
    share = (energy * inside).sum(-1) / energy.sum(-1)
    whole = share * errors["inside"] ** 2 + (1 - share) * errors["outside"] ** 2
    assert torch.allclose(whole.sqrt(), rel_error(tokens, a, b), rtol=1e-6)


def test_an_empty_part_has_no_error(tokens):
    errors = part_errors(tokens, *truncated_svd(tokens, 5), torch.zeros(3, 24, dtype=torch.bool))
    assert errors["inside"].isnan().all() and errors["outside"].isfinite().all()


def made_up_errors():
    generator = torch.Generator().manual_seed(1)
    outside = 0.1 + 0.01 * torch.rand(40, generator=generator, dtype=torch.float64)
    svd = {"inside": outside + 0.02, "outside": outside}
    return {"network": {part: e + 0.001 for part, e in svd.items()}, "svd": svd}


def test_differences_are_paired_by_image_and_their_intervals_are_over_groups():
    inside = torch.arange(16).expand(40, 16) < 4
    report = box_report(made_up_errors(), inside, [str(i // 4) for i in range(40)], 8, left_out=3)
    counts = {"rank": 8, "n_images": 40, "n_groups": 10, "n_left_out": 3, "tokens_inside_pct": 25.0}
    assert {key: report[key] for key in counts} == counts
    apart = report["svd"]["inside_minus_outside"]
    # the images differ by 0.01 in error, their differences not at all: paired, so no spread
    assert apart["mean"] == pytest.approx(0.02)
    assert apart["interval_95"] == pytest.approx([0.02, 0.02])
    assert report["network_minus_svd"]["inside"]["mean"] == pytest.approx(0.001)
    inside_mean = report["network"]["inside"]["mean"]
    assert inside_mean == pytest.approx(report["svd"]["inside"]["mean"] + 0.001)


def test_a_single_group_gives_no_interval_and_no_images_no_numbers():
    inside = torch.arange(16).expand(40, 16) < 4
    report = box_report(made_up_errors(), inside, ["one"] * 40, 8, 0)
    assert report["svd"]["inside_minus_outside"]["interval_95"] is None
    assert box_report({}, inside[:0], [], 8, 40) == {
        "rank": 8,
        "n_images": 0,
        "n_groups": 0,
        "n_left_out": 40,
    }
