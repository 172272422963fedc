"""Figure of single components: what each of them holds of X, beside the SVD's.

Arguments are arrays (numpy, or torch on any device). n images, r rank. Raises OSError where it
cannot write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from numpy.typing import ArrayLike

from figures.style import (
    NETWORK,
    ROUNDING,
    ROUNDING_PCT,
    STYLE,
    SVD,
    as_array,
    band,
    log_scale,
    new_figure,
    note,
    save,
)


@rc_context(STYLE)
def component_energy(
    path: str | Path, singular_values: dict[str, ArrayLike], energy: ArrayLike, footer: str
) -> None:
    """Draw the energy of each component, and its difference from the SVD's.

    singular_values: X and X_hat → [n, ≥ r], those of A·B (row norms of B where A is orthonormal) to
    r; energy [n]: ‖X‖². A component that is switched off has 0.
    """
    found = as_array(singular_values["X_hat"])
    sigma = as_array(singular_values["X"])[:, : found.shape[1]]
    total = np.maximum(as_array(energy), 1e-300)[:, None]
    figure = new_figure(10, 8.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    band(top, 100 * sigma**2 / total, SVD, wide=True)
    band(top, 100 * found**2 / total, NETWORK)
    top.set_ylabel("energy of component i\n(% of ‖X‖², log scale)")
    log_scale(top)
    note(top, 0.99, 0.9, "network: squared singular values of A·B", NETWORK, ha="right")
    note(top, 0.99, 0.82, "SVD: those of X", SVD, ha="right")
    on = found > 0
    apart = np.where(
        on & (sigma > 0), 100 * (found**2 / np.maximum(sigma, 1e-150) ** 2 - 1), np.nan
    )
    band(bottom, np.where(np.isnan(apart), 0, np.maximum(np.abs(apart), ROUNDING_PCT)), NETWORK)
    words = f"difference of that energy from\nthe SVD's (%, either sign; {ROUNDING} is rounding)"
    bottom.set(xlabel="component i", ylabel=words)
    log_scale(bottom)
    off = int((~on).all(0).sum())
    words = f", {off} of {on.shape[1]} switched off" if off else ""
    save(figure, path, f"Energy of each component{words}", footer)
