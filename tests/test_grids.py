"""Boxes on grids: which tokens are meant."""

import pytest

from lowrank_tokens.grids import tokens_in_box


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
