"""Time of each factorisation against the number of tokens."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context

from figures.style import METHODS, SAME_METHOD, STYLE, curve, log_scale, new_figure, save


@rc_context(STYLE)
def growth(
    path: str | Path, records: list[dict], exponents: list[dict], title: str, footer: str
) -> None:
    """ms per matrix over T, both logarithmic, one panel a rank; at each end the method, its growth.

    records, exponents: of benchmark_tokens.json.
    """
    ranks = sorted({r["rank"] for r in records})
    figure = new_figure(5.6 * len(ranks) + 0.4, 5.2)
    axes = figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0]
    powers = {(e["rank"], e["method"]): e["exponent"] for e in exponents}
    ends = {}
    for ax, rank in zip(axes, ranks, strict=True):
        ends[ax] = []
        for name in dict.fromkeys(r["method"] for r in records):
            of = [r for r in records if (r["rank"], r["method"]) == (rank, name)]
            of.sort(key=lambda r: r["tokens"])
            if not of:
                continue
            label, colour = METHODS[SAME_METHOD.get(name, name)]
            ms = [r["ms_median"] for r in of]
            curve(ax, [r["tokens"] for r in of], ms, colour)
            power = powers.get((rank, name))
            words = label if power is None else f"{label}, T$^{{{power:.1f}}}$"
            ends[ax].append((ms[-1], words, colour))
        ax.set_title(f"rank {rank}")
        ax.set_xlabel("tokens T of an image")
        log_scale(ax, "x")
        log_scale(ax)
        tokens = sorted({r["tokens"] for r in records})
        ax.set_xticks(tokens, [str(t) for t in tokens])
        ax.set_xlim(tokens[0] / 1.15, tokens[-1] * 1.08)
    axes[0].set_ylabel("ms per matrix, median")
    save(figure, path, title, footer, ends)
