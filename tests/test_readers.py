"""Readers with labels: boxes, matching between views, retrieval, each on cases done by hand."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from heads.readers import (
    Correspondence,
    View,
    average_precision,
    box_overlap,
    boxes_of_images,
    correspondences,
    fit_probes,
    fit_readers,
    largest_component,
    matched,
    nearest_is_kin,
    sample_tokens,
    union,
    unit,
)
from lowrank_tokens.grids import tokens_in_box


class TokensInMemory:
    """The part of a cache that readers look at: 16 × 16 grids, tokens and rows given."""

    is_demo, cache_dir = False, "somewhere"

    def __init__(self, tokens, records, resize="stretch"):
        import pyarrow as pa

        self.tokens, self.records = tokens, records
        side = math.isqrt(tokens.shape[1])
        self.grids = [(side, side)] * len(tokens)
        self.manifest = {"resize": resize}
        self.rows = pa.Table.from_pylist(records)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        return self.tokens[rows]

    def image_record(self, row):
        return self.records[row]


def record(row, box, **more):
    return {
        "image_sha256": f"{row:064d}",
        "group": f"group {row // 4}",
        "bbox": box,
        "width": 160,
        "height": 160,
    } | more


def signs(n=24, side=16, d=32, seed=0):
    """Images whose tokens inside a box differ by a direction that all share, and their rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, side * side, d, generator=generator)
    records = []
    for row in range(n):
        x, y = torch.randint(0, 100, (2,), generator=generator).tolist()
        records.append(record(row, [x, y, 50, 30]))
        inside = tokens_in_box((x / 160, y / 160, 50 / 160, 30 / 160), (side, side))
        tokens[row, inside, :4] += 2
    return TokensInMemory(tokens, records)


def test_average_precision_is_that_of_a_ranking_done_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.1])
    inside = torch.tensor([True, False, True, False])
    assert average_precision(scores, inside) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # equal scores count together, whatever their order
    for order in ([0, 1], [1, 0]):
        tied = average_precision(torch.ones(2), torch.tensor([True, False])[order])
        assert tied == pytest.approx(0.5)
    assert math.isnan(average_precision(scores, torch.zeros(4, dtype=torch.bool)))
    assert math.isnan(average_precision(scores, torch.ones(4, dtype=torch.bool)))


def test_the_box_is_that_of_the_largest_component_against_the_nearest_box():
    scores = torch.tensor(
        [
            [9.0, 0, 0, 0],
            [0, 0, 5, 5],
            [0, 0, 5, 5],
            [0, 0, 0, 5],
        ]
    ).flatten()
    part = largest_component(scores > 1, (4, 4))
    assert part.nonzero()[:, 0].tolist() == [6, 7, 10, 11, 15]
    boxes = [tokens_in_box(box, (4, 4)) for box in ((0, 0, 0.25, 0.25), (0.5, 0.25, 0.5, 0.5))]
    assert box_overlap(scores, 1.0, boxes, (4, 4)) == pytest.approx(4 / 5)
    assert box_overlap(scores, 10.0, boxes, (4, 4)) == 0
    assert math.isnan(box_overlap(scores, 1.0, [], (4, 4)))


def test_several_questions_about_one_image_make_one_label_of_all_their_boxes():
    tokens = torch.zeros(3, 16, 2)
    records = [record(0, [0, 0, 40, 40]), record(0, [120, 120, 40, 40]), record(1, None)]
    boxes = boxes_of_images(TokensInMemory(tokens, records))
    assert [len(masks) for masks in boxes] == [2, 2, 0]
    assert union(boxes[0], 16).nonzero()[:, 0].tolist() == [0, 15]
    assert union(boxes[2], 16).sum() == 0


def test_the_probe_minimises_the_penalised_logistic_loss():
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * torch.randn(400, 6, generator=generator) + 2
    inside = torch.rand(400, generator=generator) < torch.sigmoid(tokens[:, 0] - 3)
    sample = sample_tokens([(tokens, inside)], 1)
    (probe,) = fit_probes(sample, [0.05])
    weight = (probe.weight * sample.std).requires_grad_()
    bias = torch.tensor(probe.bias + float(probe.weight @ sample.mean), requires_grad=True)
    loss = binary_cross_entropy_with_logits(sample.tokens @ weight + bias, sample.inside)
    loss = loss + 0.025 * weight.square().sum()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (weight, bias))])
    assert gradient.norm() < 1e-4
    assert torch.allclose(
        probe.logits(tokens[:5]),
        ((tokens[:5] - sample.mean) / sample.std) @ weight + bias,
        atol=1e-4,
    )


def test_tokens_are_drawn_evenly_and_at_the_same_places_of_full_and_decoded_images():
    tokens = torch.arange(16.0)[:, None] + 100 * torch.arange(3.0)[:, None, None]
    labelled = [(image, image[:, 0] > 0) for image in tokens]
    sample = sample_tokens(labelled, 3, 30)
    values = (sample.tokens * sample.std + sample.mean).round()[:, 0]
    assert (values // 100).long().bincount().tolist() == [10, 10, 10]
    moved = sample_tokens([(image + 7, mask) for image, mask in labelled], 3, 30)
    assert torch.allclose(moved.tokens, sample.tokens, atol=1e-4)


def test_readers_find_boxes_in_full_tokens_and_less_of_them_where_tokens_lost_their_content():
    dataset = signs()
    fitted = fit_readers(dataset, range(12), range(12, 18), range(18, 24))
    rows = list(range(18, 24))
    full = fitted.scores(dataset[[row]][0] for row in rows)
    assert full["box_precision"].mean() > 0.9 and full["box_iou"].mean() > 0.4
    noise = torch.randn(6, 256, 32, generator=torch.Generator().manual_seed(5))
    worse = fitted.scores(dataset.tokens[rows] + 3 * noise)
    assert worse["box_precision"].mean() < full["box_precision"].mean() - 0.1
    lost = fitted.scores(torch.zeros(6, 256, 32))
    chance = fitted.chance()["box_precision"]
    assert lost["box_precision"].mean() == pytest.approx(chance)
    assert "matching_decoded" not in full and any("no matching" in n for n in fitted.notes())


def test_a_probe_fitted_on_decoded_tokens_is_read_on_full_ones():
    dataset = signs()
    fitted = fit_readers(dataset, range(12), range(12, 18), range(18, 24))
    full = fitted.precision_trained_on(range(12), (dataset[[row]][0] for row in range(12)))
    assert full.mean() == pytest.approx(
        float(fitted.scores(dataset.tokens[18:24])["box_precision"].mean()), abs=0.02
    )
    shuffled = torch.randn(12, 256, 32, generator=torch.Generator().manual_seed(1))
    assert fitted.precision_trained_on(range(12), shuffled).mean() < full.mean() - 0.2


def photographed(mirrored=False, resize="stretch", seed=0):
    """Two views of one photograph, its right half and its middle, each point a token of its own."""
    generator = torch.Generator().manual_seed(seed)
    world = torch.randn(8, 16, 24, generator=generator)  # 8 × 16 cells of 10 pixels
    one, other = world[:, 8:], world[:, 4:12]
    views = [[80, 0, 80, 80], [40, 0, 80, 80]]
    if mirrored:
        other = other.flip(1)
    tokens = torch.stack([one.flatten(0, 1), other.flatten(0, 1)])
    records = [
        record(i, None, photograph="a", view=views[i], mirrored=mirrored and i == 1)
        for i in range(2)
    ]
    return TokensInMemory(tokens, records, resize)


@pytest.mark.parametrize("mirrored", [False, True])
def test_tokens_are_looked_for_where_the_photograph_says_also_mirrored(mirrored):
    dataset = photographed(mirrored)
    none = [torch.zeros(64, dtype=torch.bool)] * 2
    pairs = correspondences(dataset, [0, 1], none)
    assert [(pair.query, pair.target) for pair in pairs] == [(0, 1), (1, 0)]
    assert [len(pair.tokens) for pair in pairs] == [32, 32]  # the half that both show
    for pair in pairs:
        query, target = dataset.tokens[pair.query], dataset.tokens[pair.target]
        same = (query[pair.tokens][:, None] == target[pair.candidates]).all(-1)
        assert same.sum() == 32 and pair.near[same].all()
    units = [unit(tokens) for tokens in dataset.tokens]
    hits, tokens = matched(units, units, pairs)
    assert hits.tolist() == tokens.tolist() == [32, 32]
    fitted = fit_readers(dataset, [], [], [0, 1])
    scores = fitted.scores(dataset.tokens)
    assert scores["matching_decoded"].tolist() == [1, 1]
    chance = fitted.chance()["matching_decoded"]
    noise = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(2))
    lost = fitted.scores(noise)
    assert lost["matching_decoded"].mean() == pytest.approx(chance, abs=0.15)
    assert lost["matching_query_full"].mean() < 0.5 < chance + 0.5


def test_tokens_in_boxes_are_neither_looked_for_nor_searched():
    dataset = photographed()
    boxes = [torch.zeros(64, dtype=torch.bool) for _ in range(2)]
    boxes[0][:8] = True  # the first line of the right half
    boxes[1][-8:] = True  # the last line of the middle
    first, second = correspondences(dataset, [0, 1], boxes)
    assert len(first.tokens) == len(second.tokens) == 32 - 4 - 4
    assert len(first.candidates) == len(second.candidates) == 64 - 8


def test_one_image_twice_is_no_pair_and_without_views_there_is_none():
    dataset = photographed()
    for row in dataset.records:
        row["image_sha256"] = "same"
    none = [torch.zeros(64, dtype=torch.bool)] * 2
    same = TokensInMemory(dataset.tokens, dataset.records)
    assert correspondences(same, [0, 1], none) == []
    assert correspondences(signs(2, side=8), [0, 1], none) == []


def test_a_padded_image_is_looked_for_inside_its_padding_alone():
    dataset = photographed(resize="pad")
    for row in dataset.records:
        row["height"] = (
            80  # twice as wide as high: a quarter of the rows above and below is padding
        )
    padded = TokensInMemory(dataset.tokens, dataset.records, "pad")
    none = [torch.zeros(64, dtype=torch.bool)] * 2
    first, _ = correspondences(padded, [0, 1], none)
    assert set((first.candidates // 8).tolist()) == {2, 3, 4, 5}
    assert set((first.tokens // 8).tolist()) == {2, 3, 4, 5}


def test_the_nearest_neighbour_counts_within_a_cell_and_a_half():
    tokens = torch.eye(4)
    near = torch.tensor([[True, False, False], [False, True, False]])
    pair = Correspondence(0, 1, torch.tensor([0, 2]), torch.tensor([0, 1, 2]), near)
    hits, count = matched([tokens, tokens], [tokens, tokens], [pair])
    assert hits.tolist() == [1, 0] and count.tolist() == [2, 0]


def test_a_view_maps_there_and_back():
    view = View("a", (10.0, 20.0, 40.0, 30.0), True)
    places = torch.tensor([[0.0, 0.0], [0.25, 0.5]])
    assert view.to_photograph(places).tolist() == [[50, 20], [40, 35]]
    assert torch.allclose(view.from_photograph(view.to_photograph(places)), places)


def test_retrieval_counts_the_nearest_mean_token():
    means = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.3], [-1.0, -1.0]])
    right = nearest_is_kin(means, ["a", "a", "b", "b", "c"])
    assert right[:4].tolist() == [1, 1, 1, 0]
    assert right[4].isnan()
