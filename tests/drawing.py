"""What tests of figures share: a made-up history, and the words of a figure."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.text import Text

FOOTER = "DEMO data, some-encoder, 36 images, T=16, D=40; rank 4, seed 42"


def history(epochs: int, excess: float = 0.03) -> list[dict]:
    """Entry 0 untrained with twice the excess, entry e with excess · (1 + 1/(1 + e))."""
    entries = []
    for epoch in range(epochs + 1):
        pct = excess * (1 + 1 / (1 + epoch))
        entry = {
            "epoch": epoch,
            "val_mse": 3e-4 * (1 + pct / 100) ** 2,
            "val_optimum_mse": 3e-4,
            "val_rel_error": 0.02,
            "val_excess_pct": pct,
            "effective_rank": 4,
        }
        if epoch:
            entry |= {
                "train_loss": 1.002,
                "train_mse": 4e-4 * (1 + pct / 100) ** 2,
                "train_optimum_mse": 4e-4,
                "loss_reconstruction": 1.001,
                "loss_B": 1e-4,
                "loss_ortho": 1e-3,
                "loss_lora_ortho": 0.0,
                "loss_act": 0.0,
                "shifts": [0.3, 0.7],
                "lr": 1e-4,
                "seconds": 1.0,
                "samples_per_s": 30.0,
            }
        entries.append(entry)
    return entries


def title(figure: Figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]
