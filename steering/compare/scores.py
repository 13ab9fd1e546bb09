"""Numbers of a comparison that need no model: repetition, the best budget, and the verdict by rule.

p prompts
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sae.statistics import Estimate, mean_estimate
from steering.compare.arms import NONE, PROMPTING, RANDOM, SHUFFLED

CLEAR = 0.7  # AUROC under which a target score says little about a single text


def per_prompt(level: dict[str, Any], half: str) -> np.ndarray:
    """Mean target of the texts of each prompt of that half, [p], in the order of the prompts."""
    of_prompt: dict[str, list[float]] = {}
    for text in level["texts"]:
        if text["half"] == half:
            of_prompt.setdefault(text["prompt"], []).append(text["target"])
    return np.array([np.mean(targets) for targets in of_prompt.values()])


def choose_best(levels: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The level of the highest gain on the choosing half, the weakest of equal ones; its gain is that of the scoring half."""
    able = [level for level in levels if level["failure"] is None]
    if not able:
        return None
    best = max(able, key=lambda level: level["choose"]["gain"])
    return {"budget": best["budget"], "gain": best["score"]["gain"]}


def comparison_verdict(arms: Sequence[dict[str, Any]], concept: str, held_out_auroc: float | None, seed: int = 0) -> list[str]:
    """One sentence for each method, then what they amount to.

    A method steers towards the concept when, at the budget chosen on the one half of the prompts, the interval of its gain on the other
    half is above 0, and so are those of its paired differences to the random direction and to shuffled labels at their own best budgets.
    Intervals are of 95 % each, for each method by itself: of twenty methods that do nothing, about one would pass the first condition.
    """
    best = {arm["method"]: level for arm in arms if (level := _best_level(arm)) is not None}
    controls = {name: per_prompt(best[name], "score") for name in (RANDOM, SHUFFLED) if name in best}
    sentences, steering = [], []
    for arm in arms:
        method = arm["method"]
        if arm["kind"] != "method" or method not in best:
            continue
        gain, own_p = best[method]["score"]["gain"], per_prompt(best[method], "score")
        lost = [name for name, control_p in controls.items() if mean_estimate(own_p - control_p, seed)["low"] <= 0]
        if gain["low"] > 0 and not lost:
            steering.append((gain["value"], method, own_p))
            against = f", more than {' and '.join(controls)}" if controls else ", but there was no control to compare with"
            sentences.append(f"{method} steers towards {concept}: {estimate_text(gain)} at {best[method]['budget']:g} nat{against}.")
        else:
            reason = "the interval includes 0" if gain["low"] <= 0 <= gain["high"] else "the gain is below 0"
            if gain["low"] > 0:
                reason = f"it is not more than {' and '.join(lost)}"
            sentences.append(f"{method}: no evidence that it steers towards {concept}, {estimate_text(gain)}; {reason}.")
    return sentences + _summary(steering, best, held_out_auroc, seed)


def _summary(
    steering: list[tuple[float, str, np.ndarray]], best: dict[str, dict[str, Any]], held_out_auroc: float | None, seed: int
) -> list[str]:
    sentences = []
    ranked = sorted(steering, key=lambda found: -found[0])
    if len(ranked) > 1:
        (_, first, first_p), (_, second, second_p) = ranked[:2]
        ahead = mean_estimate(first_p - second_p, seed)
        clear = "is ahead of" if ahead["low"] > 0 else "is not clearly ahead of"
        sentences.append(f"{first} gained most and {clear} {second}, the next: a difference of {estimate_text(ahead)}.")
    elif not ranked:
        sentences.append("No direction steers towards the concept at these budgets.")
    if PROMPTING in best:
        gain = best[PROMPTING]["score"]["gain"]
        sentences.append(
            f"Plain prompting, for comparison: {estimate_text(gain)}, with an off-topic KL of {best[PROMPTING]['off_topic_kl']:.2g} nat."
        )
    if held_out_auroc is not None and held_out_auroc < CLEAR:
        sentences.append(f"The target score itself is weak: AUROC {held_out_auroc:.2f} on held-out texts of the concept.")
    return sentences


def _best_level(arm: dict[str, Any]) -> dict[str, Any] | None:
    if arm["best"] is None or arm["method"] == NONE:
        return None
    return next(level for level in arm["levels"] if level["budget"] == arm["best"]["budget"])


def estimate_text(estimate: Estimate, form: str = "+.3g") -> str:
    return f"{estimate['value']:{form}} ({estimate['low']:{form}} to {estimate['high']:{form}})"
