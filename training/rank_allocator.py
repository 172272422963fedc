"""Rank allocator: lowers the rank of an AdaLoRA model while it trains, by schedule and mask.

AdaLoRA (Zhang et al. 2023) with the schedule in optimiser steps and independent of the run's
length: rank r for `init_warmup` steps, then the cubic decrease during `final_warmup` steps, then
k = round(r · keep_ratio) for good. The mask is applied in the model's forward and is nested: what
is masked stays masked.

Of projected factors the first k components are kept. They stand in Ritz order, largest first, so
no importance could choose better, and none is gathered. Of direct factors the k components with
the largest importance are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_tokens.exceptions import InputError
from model import AdaptiveLowRankProjAdaLoRA

BETA = 0.85  # of both moving averages, AdaLoRA's β1 = β2


class RankAllocator:
    """Decides, step by step, which components of `model` are kept.

    Args:
        model: an AdaLoRA model; its rank is where the schedule starts.
        init_warmup, final_warmup, mask_interval: optimiser steps.
        keep_ratio: final rank as a fraction of r, in (0, 1].
        importance: "energy", the squared error that dropping a component costs, ‖a_i‖² ‖b_i‖²
            (exact for orthonormal A); or "sensitivity", AdaLoRA's smoothed |p ∇p| times its
            uncertainty. Projected factors are kept in order: both change nothing there, and
            "sensitivity" is refused.
    """

    def __init__(
        self,
        model: AdaptiveLowRankProjAdaLoRA,
        *,
        init_warmup: int = 1000,
        final_warmup: int = 1000,
        mask_interval: int = 20,
        keep_ratio: float = 0.25,
        importance: str = "energy",
    ) -> None:
        if importance == "sensitivity" and model.config.factors != "direct":
            raise InputError(
                "--allocator_importance sensitivity needs --factors direct: projected factors give "
                "the gate no gradient; leave it at energy"
            )
        self.rank = model.config.rank
        self.target = max(1, round(model.config.rank * keep_ratio))
        self.init_warmup, self.final_warmup = init_warmup, final_warmup
        self.mask_interval = mask_interval
        self.importance = importance
        device = model.lora_E.device
        self.score = torch.zeros(self.rank, device=device)
        # one smoothed sensitivity Ī and its uncertainty U per parameter of the triplets
        self.averages: list[list[Tensor]] = []
        if importance == "sensitivity":
            self.averages = [
                [torch.zeros_like(p), torch.zeros_like(p)] for p in self._triplet_parameters(model)
            ]

    @property
    def steps_needed(self) -> int:
        return self.init_warmup + self.final_warmup

    def check_fits(self, steps: int, steps_per_epoch: int) -> None:
        """Raise InputError, with numbers that fit, where `steps` cannot reach the final rank."""
        if steps < self.steps_needed:
            epochs = -(-self.steps_needed // steps_per_epoch)
            half = max(1, steps // 3)
            raise InputError(
                f"the rank allocator needs {self.steps_needed} steps, this run has {steps}: type "
                f"--epochs {epochs} or more, or --allocator_init_warmup {half} "
                f"--allocator_final_warmup {half}"
            )

    def budget(self, step: int) -> int:
        """Return the rank kept after `step` steps (AdaLoRA, eq. 12, over final_warmup)."""
        if step < self.init_warmup:
            return self.rank
        if step >= self.steps_needed:
            return self.target
        left = 1 - (step - self.init_warmup) / self.final_warmup
        return round(self.target + (self.rank - self.target) * left**3)

    def is_final(self, step: int) -> bool:
        """Return whether the rank no longer changes."""
        return step >= self.steps_needed

    def observe(self, model: AdaptiveLowRankProjAdaLoRA, component_energy: Tensor) -> None:
        """Take one step's evidence, after backward and before the gradients are cleared.

        component_energy: [k] squared error that dropping each computed component would cost. Only
        direct factors are chosen by it.
        """
        if model.config.factors == "projected":
            return
        if self.importance == "energy":
            new = torch.zeros_like(self.score)
            new[: len(component_energy)] = component_energy.to(new.dtype)
            self.score.mul_(BETA).add_(new, alpha=1 - BETA)
            return
        score = torch.zeros_like(self.score)
        triplet = self._triplet_parameters(model)
        for parameter, (mean, uncertainty) in zip(triplet, self.averages, strict=True):
            sensitivity = (parameter.detach() * parameter.grad).abs()
            mean.mul_(BETA).add_(sensitivity, alpha=1 - BETA)
            uncertainty.mul_(BETA).add_((sensitivity - mean).abs(), alpha=1 - BETA)
            score += (mean * uncertainty).mean(-1)  # lora_E has one entry a row
        self.score = score

    def apply(self, model: AdaptiveLowRankProjAdaLoRA, step: int) -> None:
        """Set the model's mask where `step` is due for one."""
        due = (step - self.init_warmup) % self.mask_interval == 0 or step == self.steps_needed
        if step < self.init_warmup or step > self.steps_needed or not due:
            return
        kept = model.effective_rank_mask()
        budget = min(self.budget(step), model.current_effective_rank())
        mask = torch.zeros_like(kept)
        if model.config.factors == "projected":
            mask[:budget] = True  # Ritz order: the first are the strongest, ties or not
        else:
            best = self.score.masked_fill(~kept, -torch.inf).topk(budget).indices
            mask[best] = True
        model.set_rank_mask(mask, final=self.is_final(step))

    def state_dict(self) -> dict:
        return {"score": self.score, "averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        device = self.score.device
        self.score = state["score"].to(device)
        self.averages = [[t.to(device) for t in pair] for pair in state["averages"]]

    @staticmethod
    def _triplet_parameters(model: AdaptiveLowRankProjAdaLoRA) -> list[Tensor]:
        """Return E of the gate and what A and B are trained by, component i in row i of each."""
        heads = [branch.head.weight_0 for branch in (model.row_net, model.col_net)]
        return [model.lora_E, model.row_gains, model.column_gains, *heads]
