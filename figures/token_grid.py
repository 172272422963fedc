"""Figures on the grid of an image's tokens: errors and channels as maps, beside the photograph.

viridis for errors, a diverging map for signed differences; panels that compare share one scale.
Arguments are arrays (numpy, or torch on any device): T tokens on a grid (rows, columns), C
channels; a box is (x, y, w, h) in fractions of the photograph, which is drawn with the aspect of
its grid, or None. Every function
raises OSError where it cannot write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike
from PIL.Image import Image

from figures.style import (
    BLACK,
    METHODS,
    NETWORK,
    STYLE,
    as_array,
    common_limits,
    new_figure,
    note,
    save,
    spread,
    tick_label,
)
from lowrank_tokens.grids import Box, Grid, tokens_in_box

CHANNELS_A_ROW = 4
CHANNEL_ROWS = [("X", BLACK), METHODS["network"], ("network − X", NETWORK)]


def _tall(grid: Grid) -> float:
    """Return height over width of a map, within readable limits; 1 for tokens in a row."""
    return 1.0 if grid[0] == 1 else min(1.5, max(0.65, grid[0] / grid[1]))


def _token_map(ax: Axes, values: np.ndarray, grid: Grid, limits: tuple[float, float], **style):
    """Draw [T] values on their grid, one cell a token; diverging colours where limits are signed.

    Returns the image, for a colour bar.
    """
    rows, columns = grid
    ax.set(xticks=[0, columns // 2, columns], yticks=[0, rows // 2, rows])
    ax.grid(False)
    style |= {"vmin": limits[0], "vmax": limits[1], "extent": (0, columns, rows, 0)}
    image = ax.imshow(values.reshape(grid), **style)
    if rows == 1:  # tokens in a row, each one a stripe: at equal scales they would be a hair line
        ax.set(aspect=columns, yticks=[])
    return image


def _colour_bar(figure: Figure, image, axes, label: str, bins: int = 5, **style) -> None:
    style |= {"format": FuncFormatter(tick_label), "ticks": MaxNLocator(bins)}
    bar = figure.colorbar(image, ax=axes, label=label, **style)
    bar.outline.set_visible(False)


def _photograph(ax: Axes, photo: Image | None, box: Box | None, grid: Grid, **style) -> None:
    """Draw the photograph in the grid's units, and its box; words say where there is none."""
    if photo is None:
        ax.set_axis_off()
        note(ax, 0, 1, "no photograph:\nimported features", va="top")
        return
    if grid[0] == 1:  # imported: whatever the photograph was, its tokens have no aspect
        grid = (1, 1)
    ax.imshow(photo, extent=(0, grid[1], grid[0], 0), interpolation="bilinear")
    ax.set(xticks=[], yticks=[], **style)
    ax.grid(False)
    _draw_box(ax, box, grid)


def _caption(box: Box | None) -> str:
    return "photograph" if box is None else "photograph and box of its text"


def _axis_names(grid: Grid) -> tuple[str, str]:
    """Return the names of the two axes of a token map."""
    return ("token", "") if grid[0] == 1 else ("token column", "token row")


def _draw_box(ax: Axes, box: Box | None, grid: Grid) -> None:
    if box is not None:
        (x, y, w, h), (rows, columns) = box, grid
        outline = [withStroke(linewidth=3.6, foreground="black")]
        place = (x * columns, y * rows), w * columns, h * rows
        ax.add_patch(Rectangle(*place, fill=False, ec="white", lw=1.8, path_effects=outline))


@rc_context(STYLE)
def error_heatmap(
    path: str | Path, token_error: dict[str, ArrayLike], grid: Grid, footer: str
) -> None:
    """Draw the mean error per token [T] of network and SVD on one scale, and the difference."""
    errors = {name: as_array(token_error[name]) for name in ("network", "svd")}
    apart = errors["network"] - errors["svd"]
    figure = new_figure(11, 1.4 + 2.8 * _tall(grid), "compressed")
    axes = figure.subplots(1, 3)
    for ax, (name, values) in zip(axes, errors.items(), strict=False):
        image = _token_map(ax, values, grid, common_limits(*errors.values()))
        ax.set_title(f"{METHODS[name][0]}: mean {values.mean():.4g}", color=METHODS[name][1])
    signed = _token_map(axes[2], apart, grid, common_limits(apart, symmetric=True), cmap="RdBu_r")
    axes[2].set_title("network − SVD (red: SVD better)")
    across, down = _axis_names(grid)
    axes[0].set_ylabel(down)
    for ax in axes:
        ax.set_xlabel(across)
    _colour_bar(figure, image, list(axes[:2]), "relative error of a token")
    _colour_bar(figure, signed, axes[2], "difference of relative error")
    save(figure, path, "Relative error of each token, mean over test images", footer)


@rc_context(STYLE)
def channel_comparison(
    path: str | Path,
    photo: Image | None,
    box: Box | None,
    maps: dict[str, ArrayLike],
    channels: list[int],
    grid: Grid,
    info: dict[str, str],
) -> None:
    """Draw C channels of one image beside its photograph: X, the network, and their difference.

    X and network of a channel share a scale, and all differences share one. maps: original and
    network → [T, C]; channels: their numbers; info: title and footer.
    """
    original, network = (as_array(maps[name]) for name in ("original", "network"))
    reach = common_limits(network - original, symmetric=True)
    blocks = -(-len(channels) // CHANNELS_A_ROW)
    figure = new_figure(12, 1.5 + (0.6 + 6.6 * _tall(grid)) * blocks)
    rows = figure.add_gridspec(blocks * 3, CHANNELS_A_ROW + 1)
    picture = figure.add_subplot(rows[0, 0])
    caption = _caption(box).replace(" and box", "\nand box")
    _photograph(picture, photo, box, grid, title=caption)
    signed = []
    for j, channel in enumerate(channels):
        block, place = divmod(j, CHANNELS_A_ROW)
        x, found = original[:, j], network[:, j]
        axes = [figure.add_subplot(rows[3 * block + row, place + 1]) for row in range(3)]
        for ax, values in zip(axes[:2], (x, found), strict=True):
            _token_map(ax, values, grid, common_limits(x, found))
        image = _token_map(axes[2], found - x, grid, reach, cmap="RdBu_r")
        signed.append(axes[2])
        axes[0].set_title(f"channel {channel}", loc="center")
        for ax, (label, colour) in zip(axes, CHANNEL_ROWS, strict=True):
            ax.set(xticks=[], yticks=[])
            if place == 0:
                ax.set_ylabel(label, color=colour)
    _colour_bar(figure, image, signed, "network − X, units of X", aspect=40)
    save(figure, path, info["title"], info["footer"])


@rc_context(STYLE)
def spatial_error(
    path: str | Path,
    photo: Image | None,
    box: Box | None,
    token_error: dict[str, ArrayLike],
    grid: Grid,
    info: dict[str, str],
) -> None:
    """Draw the error per token [T] of one image: network, SVD and their difference.

    The network's also over the photograph, where there is one; info: title and footer.
    """
    errors = {name: as_array(token_error[name]) for name in ("network", "svd")}
    apart = errors["network"] - errors["svd"]
    figure = new_figure(11, 3.4 + 4.6 * _tall(grid), "compressed")
    (picture, *above), (spread_ax, over, signed) = figure.subplots(2, 3)
    _photograph(picture, photo, box, grid, title=_caption(box))
    _inside_outside(spread_ax, errors, box, grid)
    scale = common_limits(*errors.values())
    for ax, (name, values) in zip(above, errors.items(), strict=True):
        image = _token_map(ax, values, grid, scale)
        ax.set_title(METHODS[name][0], color=METHODS[name][1])
    if photo:
        _photograph(over, photo, None, grid)
        _token_map(over, errors["network"], grid, scale, alpha=0.6)
        over.set_title("network, over the photograph", color=NETWORK)
    else:
        over.set_axis_off()
    limits = common_limits(apart, symmetric=True)
    difference = _token_map(signed, apart, grid, limits, cmap="RdBu_r")
    signed.set_title("network − SVD (red: SVD better)")
    across, down = _axis_names(grid)
    for ax in (*above, *[over] * bool(photo), signed):
        _draw_box(ax, box, grid)
        ax.set_xlabel(across)
    above[0].set_ylabel(down)
    _colour_bar(figure, image, above[1], "relative error of a token")
    _colour_bar(figure, difference, signed, "difference of relative error")
    save(figure, path, info["title"], info["footer"])


@rc_context(STYLE)
def rank_comparison(
    path: str | Path,
    photo: Image | None,
    box: Box | None,
    maps: dict[str, list[ArrayLike]],
    rel_error: dict[str, list[float]],
    ranks: list[int],
    blocks: list[range],
    grid: Grid,
    info: dict[str, str],
) -> None:
    """Draw three principal components of X as colours, beside those of X_hat at `ranks`.

    maps: original → one array, network → one a rank: coordinates [T, c] on the components of X
    (`svd_baseline.principal_coordinates`). blocks: three of those c for each row of maps, counted
    from 0. rel_error: network, svd → one a rank; the SVD's maps look the same, its error stands
    below the network's. Colours are scaled by X's 2nd and 98th percentile and clipped, the same for
    all maps of a block; info: title and footer.
    """
    wide = 1 + len(ranks)
    figure = new_figure(3 + 1.95 * wide, 1.6 + 1.95 * max(0.8, _tall(grid)) * len(blocks))
    columns = figure.add_gridspec(1, 2, width_ratios=[3, 1.95 * wide])
    picture = figure.add_subplot(columns[0], anchor="N")
    caption = _caption(box).replace(" and box", "\nand box")
    _photograph(picture, photo, box, grid, title=caption)
    cells = columns[1].subgridspec(len(blocks), wide)
    original = as_array(maps["original"][0])
    label, colour = METHODS["network"]
    for row, block in enumerate(blocks):
        low, high = np.percentile(original[:, block], (2, 98), axis=0)
        scale = (low, np.maximum(high - low, 1e-12))
        ax = figure.add_subplot(cells[row, 0])
        ax.set_ylabel(f"components {block[0] + 1}–{block[-1] + 1}")
        _colour_map(ax, original[:, block], scale, grid)
        if row == 0:
            ax.set_title("X", loc="center")
        for i, (values, r) in enumerate(zip(maps["network"], ranks, strict=True)):
            ax = figure.add_subplot(cells[row, 1 + i])
            _colour_map(ax, as_array(values)[:, block], scale, grid)
            if row == 0:
                ax.set_title(f"{label}, rank {r}", loc="center", color=colour)
            if row == len(blocks) - 1:
                network, svd = rel_error["network"][i], rel_error["svd"][i]
                ax.set_xlabel(f"rel_error {network:.4g}\nSVD {svd:.4g}")
    save(figure, path, info["title"], info["footer"])


def _colour_map(ax: Axes, values: np.ndarray, scale: tuple, grid: Grid) -> None:
    """Draw values [T, 3] as colours of the tokens."""
    low, reach = scale
    ax.imshow(np.clip((values - low) / reach, 0, 1).reshape(*grid, 3))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)


def _inside_outside(ax: Axes, errors: dict[str, np.ndarray], box: Box | None, grid: Grid) -> None:
    """Draw mean and 10–90 % of the tokens' errors, in the box and outside it."""
    inside = tokens_in_box(box, grid).numpy()
    parts = {"in the box": inside, "outside" if box else "all": ~inside}
    parts = {f"{name}\n({m.sum()} tokens)": m for name, m in parts.items() if m.any()}
    spread(ax, {label: {n: e[mask] for n, e in errors.items()} for label, mask in parts.items()})
    ax.set(box_aspect=min(1, _tall(grid)), title="mean and 10–90 % of tokens")
    ax.set_ylabel("relative error of a token")
