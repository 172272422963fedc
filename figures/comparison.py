"""Figures of one model against the SVD and the other references, as compare_svd_nn.py draws them.

Arguments are arrays (numpy, or torch on any device), lists and dicts: no model, no cache. n images,
r rank, S = min(T, D). Every function raises OSError where it cannot write, and KeyError for a
method that has no colour in `style.METHODS`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from figures.style import (
    BLACK,
    GREY,
    METHODS,
    NETWORK,
    ROUNDING,
    ROUNDING_PCT,
    STYLE,
    SVD,
    as_array,
    band,
    column,
    common_limits,
    curve,
    in_order,
    log_scale,
    new_figure,
    note,
    note_undefined,
    percent,
    save,
    spread,
)


@rc_context(STYLE)
def comparison(
    path: str | Path, per_image: dict[str, dict[str, ArrayLike]], spectra: dict[str, ArrayLike],
    rank: int, footer: str, box: dict[str, dict[str, ArrayLike]] | None = None,
    split: str = "test",
) -> None:  # fmt: skip
    """Error per image against the SVD's, excess of every method, spectra of X and X_hat.

    per_image: method → {"rel_error": [n], "excess_pct": [n]}; spectra: X and X_hat → [n, S];
    box: network, svd → {"inside": [m], "outside": [m]}, errors in the answer's box and outside of
    the m images that have one, or None: then there is no panel for it.
    """
    figure = new_figure(17, 6) if box else new_figure(16, 6)
    widths = [1, 1.3, 1] + [0.7] * bool(box)
    scatter, strips, spectrum, *places = figure.subplots(1, len(widths), width_ratios=widths)
    for ax in places:
        _box_panel(ax, box)
    network, svd = (as_array(per_image[name]["rel_error"]) for name in ("network", "svd"))
    low, high = common_limits(network, svd)
    span = (low - 0.06 * (high - low), high + 0.06 * (high - low))
    scatter.plot(span, span, color=SVD, lw=1.4)
    scatter.plot(svd, network, "o", color=NETWORK, ms=5, alpha=0.6, mec="none")
    scatter.set(xlim=span, ylim=span, xlabel="rel_error of the SVD",
                ylabel="rel_error of the network", title=f"each dot one {split} image")  # fmt: skip
    scatter.locator_params(nbins=5)
    note(scatter, 0.97, 0.03, "on the line: as good as the SVD", SVD, ha="right")
    excess = {name: as_array(per_image[name]["excess_pct"]) for name in in_order(per_image)}
    excess = {name: values[np.isfinite(values)] for name, values in excess.items()}
    _excess_strips(strips, excess)
    sigma = as_array(spectra["X"])
    band(spectrum, sigma, BLACK, wide=True)
    band(spectrum, as_array(spectra["X_hat"])[:, :rank], NETWORK)
    spectrum.set(xlabel="index i", ylabel="singular value $σ_i$ (units of X)",
                 ylim=np.median(sigma, axis=0).max() * np.array([1e-6, 3]))  # fmt: skip
    spectrum.set_ylim(bottom=max(spectrum.get_ylim()[0], np.median(sigma, axis=0)[-1] / 3))
    log_scale(spectrum)
    note(spectrum, 0.97, 0.93, "X", BLACK, ha="right")
    note(spectrum, 0.97, 0.86, "X_hat = A·B", NETWORK, ha="right")
    spectrum.axvline(rank, color=GREY, lw=1, ls="--")
    spectrum.text(rank, 0.02, f"rank {rank} ", color=GREY, va="bottom", ha="right", rotation=90,
                  transform=spectrum.get_xaxis_transform())  # fmt: skip
    means = {name: percent(values.mean()) for name, values in excess.items() if values.size}
    others = [f"{METHODS[name][0]} {means[name]}" for name in ("random_sketch", "randomized_svd")
              if name in means]  # fmt: skip
    title = f"At rank {rank} the network's error is {means.get('network', 'undefined')} above the "
    title += "SVD's" + (f" ({', '.join(others)})" if others else "")
    save(figure, path, title, footer)


def _box_panel(ax: Axes, box: dict[str, dict[str, ArrayLike]]) -> None:
    """Errors at the tokens of the answer's box and at the others."""
    words = {"inside": "answer's box", "outside": "outside"}
    spread(ax, {words[part]: {name: as_array(box[name][part]) for name in ("network", "svd")}
                for part in words})  # fmt: skip
    ax.set(ylabel="relative error of the tokens there",
           title=f"mean, 10–90 % of {len(box['svd']['inside'])} images")  # fmt: skip


def _excess_strips(ax: Axes, excess: dict[str, np.ndarray]) -> None:
    """A row of dots per method over log excess; rounding, of either sign, sits at the left edge."""
    jitter = np.random.default_rng(0)  # the same in every run
    for y, (name, values) in enumerate(reversed(excess.items())):
        label, colour = METHODS[name]
        height = y - 0.08 + jitter.uniform(-0.2, 0.2, len(values))
        ax.plot(np.maximum(values, ROUNDING_PCT), height, "o", color=colour, ms=3.5, alpha=0.45,
                mec="none")  # fmt: skip
        text = f"{label}: " + (f"mean {percent(values.mean())}" if values.size else "undefined")
        ax.text(0.02, y + 0.24, text, color=colour, transform=ax.get_yaxis_transform())
    highest = max([v.max(initial=10 * ROUNDING_PCT) for v in excess.values()])
    ax.set(xlim=(ROUNDING_PCT / 2, 2 * highest), ylim=(-0.5, len(excess) - 0.4), yticks=[],
           xlabel=f"error above the optimum (%); {ROUNDING} and less is rounding",
           title="excess of every method, each dot one image")  # fmt: skip
    ax.spines["left"].set_visible(False)
    log_scale(ax, "x")


@rc_context(STYLE)
def rank_sweep(
    path: str | Path, ranks: dict[str, dict], num_tokens: int, feature_dim: int, footer: str
) -> None:
    """Error and excess of every method over the rank: mean, and a band up to the 90th percentile.

    ranks: as in svd_nn_comparison.json, rank → method → metric → {"mean", "p90"}.
    """
    figure = new_figure(10, 9)
    top, bottom = figure.subplots(2, 1, sharex=True)
    x = np.array(sorted(int(r) for r in ranks))
    ends: dict[Axes, list] = {top: [], bottom: []}
    for name in in_order(set().union(*ranks.values())):
        label, colour = METHODS[name]
        for ax, metric, least in ((top, "rel_error", 0), (bottom, "excess_pct", ROUNDING_PCT)):
            if (name, metric) == ("svd", "excess_pct"):
                continue  # zero by definition
            summaries = [ranks[str(r)][name][metric] for r in x]
            mean, p90 = (np.maximum(column(summaries, key), least) for key in ("mean", "p90"))
            ax.fill_between(x, mean, p90, color=colour, alpha=0.13, lw=0)
            curve(ax, x, mean, colour, wide=name == "svd")
            ends[ax].append((mean[-1], label, colour))
    stored = (num_tokens + feature_dim) / (num_tokens * feature_dim)  # of A and B, per rank
    top.set_ylabel("rel_error ‖X − A·B‖ / ‖X‖")
    bottom.set(xscale="log", xlim=(x[0] / 1.12, x[-1] * 1.12), xlabel="rank r (log scale)",
               ylabel=f"error above the optimum (%)\n{ROUNDING} and less is rounding")  # fmt: skip
    for ax in (top, bottom):
        log_scale(ax)
    if x[0] < 1 / stored < x[-1]:  # beyond it the factors take more room than X
        for ax in (top, bottom):
            ax.axvline(1 / stored, color=GREY, ls="--", lw=1)
        top.annotate(f"break-even rank {1 / stored:.0f}", (1 / stored, 0.48), (-3, 0),
                     ("data", "axes fraction"), "offset points", color=GREY, rotation=90,
                     ha="right", va="center")  # fmt: skip
    above = top.secondary_xaxis("top")
    above.set_xticks(x, [f"{100 * r * stored:.3g} %" for r in x])
    above.set_xlabel("numbers stored in A and B, r (T + D), of the T·D in X")
    bottom.set_xticks(x, [str(r) for r in x])
    for axis in (bottom.xaxis, above.xaxis):
        axis.set_minor_locator(NullLocator())
    excess = column([ranks[str(r)]["network"]["excess_pct"] for r in x], "mean")
    if np.isnan(excess).all():
        note_undefined(bottom)
    worst = percent(np.fmax.reduce(excess))  # fmax ignores NaN
    reach = f"Rank {x[0]}" if len(x) == 1 else f"Ranks {x[0]} to {x[-1]}"
    title = f"{reach}: the network's mean error is at most {worst} above the SVD's"
    save(figure, path, title, footer, ends)


@rc_context(STYLE)
def rank_per_image(path: str | Path, data: dict, footer: str) -> None:
    """Ranks that differ between images, and their errors beside those of one fixed rank.

    data: "network" and "svd", each {"ranks": [n], "rel_error": [n], "fixed_rank": the one that
    stores as much, "fixed_rel_error": [n], "rank_for_all": the one that meets the target for every
    image, or None}, and "target_error", or None where a budget was split.
    """
    figure = new_figure(13, 5.6)
    left, right = figure.subplots(1, 2)
    network, target = data["network"], data["target_error"]
    ranks = {name: as_array(data[name]["ranks"]) for name in ("network", "svd")}
    reach = max(r.max() for r in ranks.values())
    bins = np.arange(0, reach + 2, max(1, round(reach / 30))) - 0.5
    bins = np.append(bins, bins[-1] + np.diff(bins[-2:]))
    left.hist(ranks["network"], bins, color=NETWORK, alpha=0.45)
    left.hist(ranks["svd"], bins, histtype="step", color=SVD, lw=1.4)
    left.set(xlabel="rank of an image", ylabel="images", title="ranks per image: network (filled), "
             "SVD (outline)")  # fmt: skip
    left.set_ylim(top=1.25 * left.get_ylim()[1])  # room for the labels above the bars
    left.set_xlim(0, reach * 1.08)
    marks = ((network["fixed_rank"], "that stores as much"),
             (network["rank_for_all"], "that meets the target for all"))  # fmt: skip
    for (rank, text), height in zip(marks, (0.97, 0.9), strict=True):
        if rank is not None:
            side = ("right", -4) if rank > 0.54 * reach else ("left", 4)
            left.axvline(rank, color=BLACK, lw=1.2, ls="--")
            left.annotate(f"rank {rank}, the one {text}", (rank, height), (side[1], 0),
                          ("data", "axes fraction"), "offset points", color=BLACK, fontsize=10.5,
                          ha=side[0], va="top",
                          bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    ends = []
    for name, key, style, label in (
        ("svd", "fixed_rel_error", "--", "SVD"),
        ("svd", "rel_error", "-", "SVD, per image"),
        ("network", "fixed_rel_error", "--", f"rank {network['fixed_rank']} for all"),
        ("network", "rel_error", "-", "ranks per image"),
    ):
        error = np.sort(as_array(data[name][key]))
        place = 100 * (np.arange(len(error)) + 0.5) / len(error)
        wide = name == "svd"  # below the network's, and wider, so that both are seen
        right.plot(place, error, style, color=METHODS[name][1], lw=3.5 if wide else 1.5,
                   alpha=0.35 if wide else 1)  # fmt: skip
        if not wide:
            ends.append((error[-1], label, NETWORK))
    right.set(xlim=(0, 100), ylim=(0, None), xlabel="images, sorted by their error (%)",
              ylabel="rel_error ‖X − A·B‖ / ‖X‖",
              title="error: network (thin) on the SVD (wide, pale)")  # fmt: skip
    if target is not None:
        right.axhline(target, color=GREY, lw=1)
        right.annotate(f"target {target:g}", (1, target), (0, 3), textcoords="offset points",
                       color=GREY, fontsize=10.5)  # fmt: skip
    save(figure, path, _rank_gain(network, target), footer, {right: ends})


def _rank_gain(network: dict, target: float | None) -> str:
    """The finding of `rank_per_image` in words."""
    mean = as_array(network["ranks"]).mean()
    if target is not None:
        return (f"Every image is within {target:g} at {mean:.1f} components on average; one rank "
                f"for all would have to be {network['rank_for_all']}")  # fmt: skip
    pairs = [as_array(network[key]) for key in ("rel_error", "fixed_rel_error")]
    change = {}
    for name, of in (("rms", lambda e: np.sqrt(np.mean(e**2))), ("largest", np.max)):
        own, fixed = map(of, pairs)
        change[name] = f"{100 * (own / fixed - 1) if fixed else 0:+.1f} %"
    return (f"Ranks by need, {mean:.0f} on average, against rank {network['fixed_rank']} for all: "
            f"rms error {change['rms']}, largest error {change['largest']}")  # fmt: skip
