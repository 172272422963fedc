"""The heads by name: which there are, and the one for a cache.

head = load_head("saliency", dataset, device="cpu")
"""

from __future__ import annotations

import torch

from heads.saliency import SaliencyHead
from heads.task_head import TaskHead
from lowrank_tokens.exceptions import InputError
from qwenvl_dataloader import RealQwenVLDataset

HEADS = ("saliency", "qwen-answer")


def load_head(
    name: str,
    dataset: RealQwenVLDataset,
    *,
    device: torch.device | str,
    model: str | None = None,
    flag: str = "--head",
) -> TaskHead:
    """Load the head called `name` for the rows of `dataset`.

    model: folder or hub id of the Qwen2.5-VL checkpoint of `qwen-answer` (default: the cache's own
    encoder). flag: that names it. Raises InputError for an unknown name, or where the cache holds
    another encoder's tokens than the head reads.
    """
    if name not in HEADS:
        raise InputError(f"{flag} {name} is unknown: type one of {', '.join(HEADS)}")
    if name == "saliency":
        return SaliencyHead(dataset, device)
    # transformers' language model takes seconds to load
    from heads.qwen_answer import QwenAnswerHead

    return QwenAnswerHead(dataset, device, model)
