"""Whether a model does a task at all, before any circuit: how often it prefers the right answer, and the effect of corrupting.

n pairs · p positions · v vocabulary
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.statistics import Estimate, mean_estimate, wilson_interval
from steering.circuits.tasks.prompts import Prompts

BATCH_TOKENS = 4096  # whose logits are in memory at once


class Presence(NamedTuple):
    n: int
    accuracy: Estimate
    """share of the clean prompts on which the metric is above 0, with Wilson's interval"""
    clean: Estimate
    """mean metric on the clean prompts"""
    corrupt: Estimate
    """mean metric on the corrupt prompts, of the clean prompts' answers"""
    effect: Estimate
    """mean of clean minus corrupt"""

    @property
    def there(self) -> bool:
        """Whether more than half are right and corrupting lowers the metric, both beyond their 95 % intervals."""
        return self.accuracy["low"] > 0.5 and self.effect["low"] > 0

    def sentence(self) -> str:
        """ "97 % of 32 right (84 to 99 %), clean minus corrupt 4.1 (3.8 to 4.4)" """
        share, (effect, low, high) = self.accuracy, (self.effect[key] for key in ("value", "low", "high"))
        percent = f"{share['value']:.0%} of {self.n} right ({share['low']:.0%} to {share['high']:.0%})".replace("%", " %")
        return f"{percent}, clean minus corrupt {effect:.2f} ({low:.2f} to {high:.2f})"


def task_facts(prompts: Prompts, found_on: Prompts, held_out: Prompts, there: Presence) -> dict[str, Any]:
    """The task's entry in a circuit's file."""
    return {
        "name": prompts.task,
        "corruption": prompts.corruption,
        "metric": prompts.metric,
        "pairs": len(prompts),
        "found_on": len(found_on),
        "held_out": len(held_out),
        "left_out": prompts.dropped,
        "example": prompts.pairs[0]._asdict(),
        "accuracy": there.accuracy,
        "clean": there.clean,
        "corrupt": there.corrupt,
        "effect": there.effect,
    }


@torch.no_grad()
def last_logits(lm: LanguageModel, ids_np: Tensor, mask_np: Tensor) -> Tensor:
    """Logits at the last column, float32 or wider [n, v]."""
    rows = max(1, BATCH_TOKENS // ids_np.shape[1])
    parts = [lm.logits(ids, mask)[:, -1] for ids, mask in zip(ids_np.split(rows), mask_np.split(rows))]
    logits_nv = torch.cat(parts)
    return logits_nv if logits_nv.dtype == torch.float64 else logits_nv.float()


def presence(lm: LanguageModel, prompts: Prompts, seed: int = 0) -> Presence:
    """Runs both sides of all pairs once."""
    clean_n = prompts.measure(last_logits(lm, prompts.clean_np, prompts.clean_mask_np)).double().cpu().numpy()
    corrupt_n = prompts.measure(last_logits(lm, prompts.corrupt_np, prompts.corrupt_mask_np)).double().cpu().numpy()  # host sync
    return presence_of(clean_n, corrupt_n, seed)


def presence_of(clean_n: np.ndarray, corrupt_n: np.ndarray, seed: int = 0) -> Presence:
    """From the metric on both sides of each pair."""
    n, right = len(clean_n), int((clean_n > 0).sum())
    low, high = wilson_interval(right, n)
    accuracy = {"value": right / n, "low": low, "high": high}
    return Presence(n, accuracy, *(mean_estimate(value_n, seed) for value_n in (clean_n, corrupt_n, clean_n - corrupt_n)))


def require_present(found: Presence, task: str, model: str) -> None:
    """Raises `InputError` with the numbers if the model does not do the task."""
    if not found.there:
        raise InputError(
            f"expected {model!r} to do the task {task}, more than half right and an effect above 0 beyond their intervals, but got "
            f"{found.sentence()}; give another task or model, or more pairs"
        )
