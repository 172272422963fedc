"""Readers with labels that no code was made for: boxes, matching between views, retrieval.

    readers = fit_readers(dataset, train, validation, test)       # rows of the cache
    scores = readers.scores(decoded)                              # raw tokens of the test rows
    scores["box_precision"]                                       # [n] float64, one an image

- boxes: a logistic probe says of each token whether it lies in an answer's box. It is fitted on
  full tokens of training images. Labels are the union of all boxes of one image.
- boxes, trained: the same probe fitted on decoded training tokens, read on full ones.
- matching: between two views of one photograph, the share of tokens whose nearest neighbour by
  cosine lies within MATCH_RADIUS cells of its true place. Tokens in boxes are left out.
- retrieval: whether the nearest mean token by cosine is that of another image of the same group.

Legend: n images, T tokens of an image on a grid (rows, columns), D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from lowrank_tokens.grids import Grid, box_in_view, tokens_in_box
from qwenvl_dataloader import RealQwenVLDataset

PROBE_TOKENS = 50_000  # of training images, drawn evenly over them
PENALTIES = (1e-1, 1e-2, 1e-3)  # of mean loss + penalty / 2 ‖w‖², features of unit variance
PROBE_ITERATIONS = 20  # of L-BFGS, for each penalty; it goes on from the stronger one's weights
MATCH_RADIUS = 1.5  # cells of the grid that is searched
VIEW_COLUMNS = ("photograph", "view", "mirrored")


# ------------------------------------------------------------------------------------------ labels


def boxes_of_images(dataset: RealQwenVLDataset) -> list[list[Tensor]]:
    """Return for each row of the cache the token masks [T] bool of all boxes of its image.

    Rows share an image where their hashes agree: several questions are asked about one picture.
    Boxes that cover no token are left out.
    """
    resize = dataset.manifest["resize"]
    images = image_names(dataset)
    masks: dict[str, list[Tensor]] = {name: [] for name in images}
    for row, name in enumerate(images):
        mask = tokens_in_box(box_in_view(dataset.image_record(row), resize), dataset.grids[row])
        if mask.any() and not any(torch.equal(mask, other) for other in masks[name]):
            masks[name].append(mask)
    return [masks[name] for name in images]


def image_names(dataset: RealQwenVLDataset) -> list[str]:
    """Return a name for each row's image: its hash, or the row's number where none is known."""
    if "image_sha256" not in dataset.rows.column_names:
        return [str(row) for row in range(len(dataset))]
    hashes = dataset.rows["image_sha256"].to_pylist()
    return [known or str(row) for row, known in enumerate(hashes)]


def union(masks: Sequence[Tensor], tokens: int) -> Tensor:
    """Return the tokens [T] bool that any of the masks covers."""
    return torch.stack(list(masks)).any(0) if masks else torch.zeros(tokens, dtype=torch.bool)


# ------------------------------------------------------------------------------------------- boxes


class BoxProbe(NamedTuple):
    """Logits of a token x [D] lying in a box: x · weight + bias."""

    weight: Tensor  # [D] float32
    bias: float
    penalty: float

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits [T] float32 of raw tokens [T, D]."""
        return tokens.float() @ self.weight + self.bias


class ProbeSample(NamedTuple):
    """Training tokens of a probe, each feature of mean 0 and variance 1, and their labels."""

    tokens: Tensor  # [m, D] float32
    inside: Tensor  # [m] float32, 0 or 1
    mean: Tensor  # [D]
    std: Tensor  # [D]


def sample_tokens(
    images: Iterable[tuple[Tensor, Tensor]], count: int, most: int = PROBE_TOKENS
) -> ProbeSample:
    """Draw at most `most` tokens evenly over `count` images.

    images: raw tokens [T, D] and their labels [T] bool, of which at most one is held at a time.
    The places drawn depend on the image's number alone, so that full and decoded tokens of one
    image are compared at the same places.
    """
    each = max(1, most // max(1, count))
    tokens, inside = [], []
    for number, (raw, mask) in enumerate(images):
        order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(number))[:each]
        tokens.append(raw[order].float())
        inside.append(mask[order])
    x, y = torch.cat(tokens), torch.cat(inside).float()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    return ProbeSample(x.sub_(mean).div_(std), y, mean, std)


def fit_probes(sample: ProbeSample, penalties: Sequence[float] = PENALTIES) -> list[BoxProbe]:
    """Fit a logistic probe for each penalty, the strongest first, by L-BFGS.

    Each begins at the weights of the one before. Cost: O(m D) for each iteration.
    """
    weight = torch.zeros(sample.tokens.shape[1] + 1, requires_grad=True)
    probes = []
    for penalty in sorted(penalties, reverse=True):
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=PROBE_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure(penalty: float = penalty, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            logits = sample.tokens @ weight[:-1] + weight[-1]
            loss = F.binary_cross_entropy_with_logits(logits, sample.inside)
            loss = loss + penalty / 2 * weight[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        raw = weight.detach()[:-1] / sample.std
        bias = float(weight.detach()[-1] - raw @ sample.mean)
        probes.append(BoxProbe(raw, bias, penalty))
    return probes


def average_precision(scores: Tensor, inside: Tensor) -> float:
    """Return Σ_k (recall_k − recall_{k−1}) · precision_k over the distinct scores, largest first.

    Tokens of equal score count together, as in scikit-learn: their order says nothing.
    scores [T], inside [T] bool. NaN where no token or every token is inside.
    """
    if not inside.any() or inside.all():
        return math.nan
    values, order = scores.double().sort(descending=True)
    hits = inside[order].double().cumsum(0)
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])
    hits, taken = hits[last], (torch.arange(len(values)) + 1.0)[last]
    gained = torch.diff(hits, prepend=torch.zeros(1, dtype=hits.dtype))
    return float((gained * hits / taken).sum() / inside.sum())


def largest_component(inside: Tensor, grid: Grid) -> Tensor:
    """Return the largest 4-connected part [T] bool of a mask [T] over the grid."""
    labels, count = ndimage.label(inside.reshape(grid).numpy())
    if not count:
        return inside.new_zeros(len(inside))
    sizes = np.bincount(labels.ravel())[1:]
    return torch.from_numpy(labels == 1 + sizes.argmax()).flatten()


def box_overlap(scores: Tensor, threshold: float, boxes: Sequence[Tensor], grid: Grid) -> float:
    """Return the IoU of the largest component above the threshold with the nearest box, in tokens.

    scores [T]; boxes: masks [T] bool, of which the one with the largest IoU counts. NaN without
    boxes, 0 where no token is above the threshold.
    """
    part = largest_component(scores > threshold, grid)
    overlaps = [float((part & box).sum() / (part | box).sum()) for box in boxes]
    return max(overlaps, default=math.nan)


# ---------------------------------------------------------------------------------------- matching


class View(NamedTuple):
    """A part of a photograph that an image shows, perhaps mirrored left to right."""

    photograph: str
    box: tuple[float, float, float, float]  # x, y, w, h in pixels of the photograph
    mirrored: bool

    def to_photograph(self, places: Tensor) -> Tensor:
        """Map fractions (across, down) of the image [..., 2] to pixels of the photograph."""
        x, y, w, h = self.box
        across = 1 - places[..., 0] if self.mirrored else places[..., 0]
        return torch.stack([x + across * w, y + places[..., 1] * h], dim=-1)

    def from_photograph(self, pixels: Tensor) -> Tensor:
        """Map pixels of the photograph [..., 2] to fractions of the image, beyond [0, 1] too."""
        x, y, w, h = self.box
        across, down = (pixels[..., 0] - x) / w, (pixels[..., 1] - y) / h
        return torch.stack([1 - across if self.mirrored else across, down], dim=-1)


def views_of(dataset: RealQwenVLDataset) -> list[View | None] | None:
    """Return the view of each row; None of a cache that does not say which photograph is shown."""
    if not set(VIEW_COLUMNS) <= set(dataset.rows.column_names):
        return None
    columns = (dataset.rows[name].to_pylist() for name in VIEW_COLUMNS)
    views = [
        View(photograph, tuple(view), bool(mirrored)) if photograph and view else None
        for photograph, view, mirrored in zip(*columns, strict=True)
    ]
    return views if any(views) else None


class Correspondence(NamedTuple):
    """Tokens of one image that are also seen in another, and where they are there."""

    query: int  # of the images, whose tokens are looked for
    target: int  # of the images, among whose tokens they are looked for
    tokens: Tensor  # [m] of the query
    candidates: Tensor  # [c] of the target
    near: Tensor  # [m, c] bool: which candidates are within MATCH_RADIUS cells of the true place


def token_places(dataset: RealQwenVLDataset, row: int) -> Tensor:
    """Return the centres of a row's tokens as fractions (across, down) of its image, [T, 2].

    Beyond [0, 1] are tokens of the padding of `--resize pad`.
    """
    rows, columns = dataset.grids[row]
    down, across = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    places = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1).flatten(0, 1)
    left, top, width, height = image_in_view(dataset, row)
    return (places - torch.tensor([left, top])) / torch.tensor([width, height])


def image_in_view(dataset: RealQwenVLDataset, row: int) -> tuple[float, float, float, float]:
    """Return where a row's image lies in what the encoder saw: x, y, w, h in fractions of it."""
    record = dataset.image_record(row)
    whole = {"bbox": [0, 0, record["width"], record["height"]]}
    return box_in_view(record | whole, dataset.manifest["resize"])


def correspondences(
    dataset: RealQwenVLDataset, rows: list[int], boxes: list[Tensor]
) -> list[Correspondence]:
    """Find the tokens that two of the rows show of one photograph, for every ordered pair.

    boxes: of each of the rows the tokens [T] bool in boxes. They are neither looked for nor
    searched, and a token whose true place lies in a box is left out. Two rows of one image are no
    pair.
    """
    views, names = views_of(dataset) or [None] * len(dataset), image_names(dataset)
    found = []
    for query, row in enumerate(rows):
        for target, other in enumerate(rows):
            same = views[row] and views[other] and names[row] != names[other]
            if same and views[row].photograph == views[other].photograph:
                pixels = views[row].to_photograph(token_places(dataset, row))
                there = views[other].from_photograph(pixels)
                tokens, cells = _seen_tokens(dataset, other, there, boxes[query], boxes[target])
                candidates, centres = _candidates(dataset, other, boxes[target])
                if len(tokens) and len(candidates):
                    near = torch.cdist(cells, centres) <= MATCH_RADIUS
                    found.append(Correspondence(query, target, tokens, candidates, near))
    return found


def _seen_tokens(
    dataset: RealQwenVLDataset, target: int, places: Tensor, in_box: Tensor, target_in_box: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the query's tokens [m] that row `target` shows, and their places in cells [m, 2].

    places: centres of the query's tokens as fractions (across, down) of the target's image, [T, 2].
    in_box, target_in_box: tokens [T] bool in boxes of the two, which are left out.
    """
    left, top, width, height = image_in_view(dataset, target)
    rows, columns = dataset.grids[target]
    in_view = places * torch.tensor([width, height]) + torch.tensor([left, top])
    cells = in_view * torch.tensor([columns, rows])
    seen = ((places >= 0) & (places < 1)).all(-1) & ~in_box
    column, row = cells.long().clamp_min(0).unbind(-1)
    token = row.clamp_max(rows - 1) * columns + column.clamp_max(columns - 1)
    tokens = (seen & ~target_in_box[token]).nonzero()[:, 0]
    return tokens, cells[tokens]


def _candidates(dataset: RealQwenVLDataset, target: int, in_box: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens [c] of row `target` to search, and their centres in cells [c, 2]."""
    places = token_places(dataset, target)
    columns = dataset.grids[target][1]
    tokens = (((places >= 0) & (places <= 1)).all(-1) & ~in_box).nonzero()[:, 0]
    return tokens, torch.stack([tokens % columns, tokens // columns], -1) + 0.5


def matched(
    queries: list[Tensor], targets: list[Tensor], pairs: list[Correspondence]
) -> tuple[Tensor, Tensor]:
    """Count the tokens of each image that are found within MATCH_RADIUS, and those looked for.

    queries, targets: tokens [T, D] of norm 1 (`unit`) of each image. Returns two tensors [n]
    float64.
    """
    hits, all_tokens = torch.zeros(2, len(queries), dtype=torch.float64)
    for pair in pairs:
        # one product for the whole image is as fast as for some of its tokens, without copies
        cosine = (queries[pair.query] @ targets[pair.target].mT)[pair.tokens][:, pair.candidates]
        nearest = cosine.argmax(-1, keepdim=True)
        hits[pair.query] += pair.near.gather(1, nearest).sum()
        all_tokens[pair.query] += len(nearest)
    return hits, all_tokens


def unit(tokens: Tensor) -> Tensor:
    """Return raw tokens [T, D] divided by their norms, float32."""
    return F.normalize(tokens.float(), dim=-1)


# --------------------------------------------------------------------------------------- retrieval


def nearest_is_kin(means: Tensor, groups: list[str]) -> Tensor:
    """Return 1 where the nearest other mean token [n, D] by cosine has the same group, else 0: [n].

    NaN for an image that is alone in its group.
    """
    unit = F.normalize(means.double(), dim=-1)
    near = (unit @ unit.mT).fill_diagonal_(-torch.inf).argmax(-1)
    right = torch.tensor([groups[i] == groups[j] for i, j in enumerate(near.tolist())]).double()
    alone = torch.tensor([groups.count(group) == 1 for group in groups])
    return right.masked_fill(alone, math.nan)


# ----------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Readers:
    """All readers of some images of a cache; `fit_readers` makes them.

    rows: of the images, n of them; probe and threshold: of boxes, fitted on full tokens (None where
    the cache has no boxes); pairs: of matching (none where the cache does not know its views).
    """

    dataset: RealQwenVLDataset
    rows: list[int]
    train: list[int]
    boxes: list[list[Tensor]]  # of every row of the cache
    probe: BoxProbe | None
    threshold: float
    pairs: list[Correspondence]

    def scores(self, decoded: Iterable[Tensor]) -> dict[str, Tensor]:
        """Read decoded raw tokens [T, D] of each of the rows: name → [n] float64.

        NaN where an image has no box, no other view, or no other image of its group. Names whose
        labels the cache lacks are absent.
        """
        means, kept, precision, overlap = [], [], [], []
        for row, raw in zip(self.rows, decoded, strict=True):
            means.append(raw.float().mean(0))
            if self.probe:
                logits, boxes = self.probe.logits(raw), self.boxes[row]
                precision.append(average_precision(logits, union(boxes, len(raw))))
                overlap.append(box_overlap(logits, self.threshold, boxes, self.dataset.grids[row]))
            if self.pairs:
                kept.append(unit(raw))
        found = {}
        if self.probe:
            found["box_precision"] = torch.tensor(precision, dtype=torch.float64)
            found["box_iou"] = torch.tensor(overlap, dtype=torch.float64)
        if self.pairs:
            queries_of = {"matching_query_full": self._full_units, "matching_decoded": kept}
            for name, queries in queries_of.items():
                hits, tokens = matched(queries, kept, self.pairs)
                found[name] = hits / tokens  # NaN where 0 / 0
        groups = self.dataset.rows["group"].take(self.rows).to_pylist()
        found["retrieval"] = nearest_is_kin(torch.stack(means), groups)
        return found

    def precision_trained_on(self, rows: Sequence[int], decoded: Iterable[Tensor]) -> Tensor:
        """Fit the probe on decoded tokens of `rows` and read full tokens: precision, [n] float64.

        rows: training rows with boxes; decoded: their raw tokens [T, D]. The penalty is the one
        chosen for full tokens. Needs a probe.
        """
        labels = (union(self.boxes[row], math.prod(self.dataset.grids[row])) for row in rows)
        sample = sample_tokens(zip(decoded, labels, strict=True), len(rows))
        strongest_first = [p for p in PENALTIES if p >= self.probe.penalty]
        probe = fit_probes(sample, strongest_first)[-1]
        return box_precision(self.dataset, self.boxes, probe, self.rows)

    @cached_property
    def _full_units(self) -> list[Tensor]:
        """Return the full tokens of each of the rows, of norm 1."""
        return [unit(self.dataset[[row]][0]) for row in self.rows]

    def chance(self) -> dict[str, float]:
        """Return what guessing scores: the share of tokens in boxes, and of near candidates."""
        found = {}
        if self.probe:
            masks = (
                union(self.boxes[row], math.prod(self.dataset.grids[row])) for row in self.rows
            )
            shares = [float(mask.float().mean()) for mask in masks if mask.any()]
            found["box_precision"] = sum(shares) / max(1, len(shares))
        if self.pairs:
            near = torch.cat([pair.near.double().mean(-1) for pair in self.pairs])
            found["matching_decoded"] = found["matching_query_full"] = float(near.mean())
        return found

    def notes(self) -> list[str]:
        """Say in whole sentences what the labels are, and which readers are left out and why."""
        lines = []
        if self.probe and self.dataset.is_demo:
            lines.append("boxes are those of the demo's rendered signs")
        if not self.probe:
            lines.append("no boxes: the cache has too few rows with a bbox")
        if not self.pairs:
            lines.append(
                "no matching: the cache does not know two views of a photograph "
                "(its rows lack photograph and view, which the demo's data and write_cache can say)"
            )
        return lines


def box_precision(
    dataset: RealQwenVLDataset, boxes: list[list[Tensor]], probe: BoxProbe, rows: Iterable[int]
) -> Tensor:
    """Return the average precision of a probe on full tokens of the rows, [n] float64."""
    values = []
    for row in rows:
        raw = dataset[[row]][0]
        values.append(average_precision(probe.logits(raw), union(boxes[row], len(raw))))
    return torch.tensor(values, dtype=torch.float64)


def fit_readers(
    dataset: RealQwenVLDataset,
    train: Sequence[int],
    validation: Sequence[int],
    rows: Sequence[int],
    tokens: int = PROBE_TOKENS,
) -> Readers:
    """Fit the readers of `rows`: the probe on `train`, its penalty and threshold on `validation`.

    train, validation, rows: rows of the cache; of the first two those without a box are not used.
    tokens: of training images that the probe is fitted to, at most.
    """
    boxes = boxes_of_images(dataset)
    rows = list(rows)
    train, validation = ([row for row in part if boxes[row]] for part in (train, validation))
    probe, threshold = None, math.nan
    if train and validation and any(boxes[row] for row in rows):
        labelled = (
            (dataset[[row]][0], union(boxes[row], math.prod(dataset.grids[row]))) for row in train
        )
        probes = fit_probes(sample_tokens(labelled, len(train), tokens))
        probe = max(probes, key=lambda p: mean(box_precision(dataset, boxes, p, validation)))
        threshold = best_threshold(dataset, boxes, probe, validation)
    masks = [union(boxes[row], math.prod(dataset.grids[row])) for row in rows]
    pairs = correspondences(dataset, rows, masks)
    return Readers(dataset, rows, train, boxes, probe, threshold, pairs)


def best_threshold(
    dataset: RealQwenVLDataset, boxes: list[list[Tensor]], probe: BoxProbe, rows: Sequence[int]
) -> float:
    """Return the logit with the largest mean `box_overlap` on full tokens of the rows."""
    logits = [probe.logits(dataset[[row]][0]) for row in rows]
    candidates = torch.cat(logits).double().quantile(torch.linspace(0.5, 0.995, 34).double())

    def overlap(threshold: float) -> float:
        per_image = (
            box_overlap(values, threshold, boxes[row], dataset.grids[row])
            for values, row in zip(logits, rows, strict=True)
        )
        return mean(torch.tensor(list(per_image), dtype=torch.float64))

    return max(candidates.tolist(), key=overlap)


def mean(values: Tensor) -> float:
    """Return the mean of the values that are known; 0 where none is."""
    return float(values.nanmean().nan_to_num())
