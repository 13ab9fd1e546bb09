"""The measurements of a comparison: each arm's continuations at each strength, and the counts in them.

s texts (prompts times samples) · p prompts, or positions of a batch of ids · n new tokens or real positions · v vocabulary · t texts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.disk.reading import read_json
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel, NonFiniteLogits
from sae.model.sampling import Sampling
from sae.pieces import Pieces
from sae.statistics import Estimate, auroc_estimate, mean_estimate
from steering.breakdown.working_range import RangeFinder, WorkingRange
from steering.compare.arms import Arm
from steering.compare.concepts import TextScore
from steering.compare.scores import choose_best
from steering.directions.texts import means_of_texts
from steering.intervention import steered
from steering.strength.calibration import (
    Calibration,
    Calibrator,
    DirectionStrength,
    Divergence,
    SteeredTexts,
    divergence,
    encode_cut,
    log_probs,
)
from steering.strength.measure import continuation_loss, distinct_2, longest_repeat, until_end
from steering.strength.neutral import SENTENCES
from steering.vector import SteeringVector

CALIBRATION_SENTENCES, OFF_TOPIC_SENTENCES = SENTENCES[::2], SENTENCES[1::2]
HALVES = ("choose", "score")
BROKEN_FACTOR = 5.0  # times the largest budget: the strength of the sample that shows how text breaks
BROKEN_TOLERANCE = 0.25  # of that budget
BROKEN_PROMPTS = 3


@dataclass(frozen=True)
class ComparisonSetup:
    """The shared inputs of all arms' measurements."""

    lm: LanguageModel
    prompts: Sequence[str]
    samples: int
    sampling: Sampling
    budgets: Sequence[float]
    target: TextScore
    second: TextScore | None
    held: tuple[Sequence[str], Sequence[str]]
    """held-out texts, positive and negative"""

    @property
    def seed(self) -> int:
        """of the sampling and of the intervals"""
        return self.sampling.seed

    @cached_property
    def calibrator(self) -> Calibrator:
        return Calibrator(self.lm, CALIBRATION_SENTENCES)

    @cached_property
    def off_topic(self) -> SteeredTexts:
        """Sentences that are not used for calibration."""
        return SteeredTexts(self.lm, *encode_cut(self.lm, OFF_TOPIC_SENTENCES))

    @cached_property
    def _finders(self) -> dict[str, RangeFinder]:
        return {}

    @cached_property
    def _held_means(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {}

    def working_range(self, vector: SteeringVector) -> WorkingRange:
        """Raises `InputError` for a vector without a working range."""
        if vector.site not in self._finders:
            self._finders[vector.site] = RangeFinder(self.lm, vector.site)
        return self._finders[vector.site].of(vector)

    def held_means(self, sites: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean activation of each held-out text, positive and negative, [t, d]; each site is recorded once, for all arms."""
        if missing := [site for site in sites if site not in self._held_means]:
            positive, negative = (means_of_texts(self.lm, side, missing) for side in self.held)
            self._held_means.update({site: (positive[site], negative[site]) for site in missing})
        return {site: self._held_means[site] for site in sites}


class Continuations(NamedTuple):
    texts: list[str]
    """prompt by prompt, [prompts · samples]"""
    tokens: list[list[int]]
    nats_p: np.ndarray
    """per token of each prompt's continuations, under the unsteered model after the plain prompt"""


def measure_arms(setup: ComparisonSetup, arms: Sequence[Arm], made: Pieces) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of all arms, and the samples of broken text, as JSON holds them. The first arm is the one without steering.

    Each arm is a piece of the work: those that were measured before are read, and other processes of `made` share the rest.
    """
    present = [number for number, arm in enumerate(arms) if arm.left_out is None]

    def make(numbers: Sequence[int], none_p: np.ndarray | None, what: str = "") -> dict[int, dict[str, Any]]:
        def compute(at: int, path: Path) -> Callable[[], None]:
            arm = arms[numbers[at]]
            return partial(write_json, path, measure_arm(setup, arm, none_p, partial(made.advance, arm=arm.method)))

        sizes = {f"arm-{number:02d}.json": len(setup.budgets) + 1 if arms[number].vector else 1 for number in numbers}
        paths = made.make(sizes, compute, what, "strengths")
        return {number: read_json(path, "a measured arm") for number, path in zip(numbers, paths)}

    found = make(present[:1], None)
    none_p = _by_prompt(setup, np.array([text["target"] for text in found[0]["entry"]["levels"][0]["texts"]]))
    found |= make(present[1:], none_p, "comparing")
    entries = [found[number]["entry"] if number in found else _blank(arm) for number, arm in enumerate(arms)]
    return entries, [found[number]["broken"] for number in present if found[number]["broken"]]


def measure_arm(setup: ComparisonSetup, arm: Arm, none_p: np.ndarray | None, advance: Callable[[int], None]) -> dict[str, Any]:
    """An arm's entry, and its sample of broken text, if it has one. `none_p`: target of no steering by prompt; None: it is this arm.

    Levels whose coefficient lies beyond the arm's working range say so; an arm without such a range says why.
    """
    entry, works, broken = _blank(arm), None, None
    calibrations, breaking = _strengths(setup, arm)
    if arm.vector is not None:
        try:
            works = setup.working_range(arm.vector)
            entry["working_range"] = works._asdict()
        except InputError as reason:
            entry["no_working_range"] = str(reason)
    for calibration in calibrations:
        continued = continuations(setup, arm, calibration.coefficient, setup.samples)
        if none_p is None:
            none_p = _by_prompt(setup, setup.target.score(continued.texts))  # type: ignore[union-attr]
        measured = level(setup, calibration, continued, off_topic(setup, arm, calibration.coefficient), none_p)
        measured["beyond_working_range"] = works.excludes(calibration.coefficient) if works else None
        entry["levels"].append(measured)
        advance(1)
    if breaking is not None:
        broken = _broken(setup, arm, breaking)
        advance(1)
    entry |= {"detection_auroc": detection_auroc(setup, arm.vector), "best": choose_best(entry["levels"])}
    return {"entry": entry, "broken": broken}


def _blank(arm: Arm) -> dict[str, Any]:
    """The entry of an arm before anything is measured."""
    entry: dict[str, Any] = {"method": arm.method, "kind": arm.kind, "note": arm.note, "left_out": arm.left_out}
    return entry | {"detection_auroc": None, "levels": [], "best": None, "working_range": None, "no_working_range": None}


def _strengths(setup: ComparisonSetup, arm: Arm) -> tuple[list[Calibration], Calibration | None]:
    """One for each budget, and one that breaks the text; a baseline has but one, and none that breaks."""
    if arm.vector is None:
        return [Calibration(0.0, 0.0, 0.0, 0.0, None, True, True)], None
    strength = DirectionStrength(setup.calibrator, arm.vector, arm.strongest)
    return [strength.at(budget) for budget in setup.budgets], strength.at(BROKEN_FACTOR * max(setup.budgets), BROKEN_TOLERANCE)


def _written(setup: ComparisonSetup, arm: Arm, coefficient: float, prompts: Sequence[str], samples: int) -> Tensor | str:
    """New ids of all prompts in one left-padded batch, [s, n], each prompt `samples` times; or a sentence that says why there is no
    text."""
    lm = setup.lm
    bos = lm.tokenizer.bos_token or ""  # a prompt that brings its own has it before the prefix, as all have
    texts = [arm.prefix + prompt.removeprefix(bos) for prompt in prompts]
    ids_sp, mask_sp = (t.repeat_interleave(samples, 0) for t in lm.encode(texts))
    start = ids_sp.shape[1]
    positional = arm.vector is not None and any(d.ndim == 2 for d in arm.vector.directions.values())
    try:
        with steered(lm, [(arm.vector, coefficient)] if arm.vector else [], prompt_length=start if positional else None):
            return lm.generate(ids_sp, mask_sp, **vars(setup.sampling))[:, start:]
    except (NonFiniteLogits, OverflowError) as error:
        return f"no text: {error}"


def _until_end(lm: LanguageModel, new_sn: Tensor) -> tuple[list[str], list[list[int]]]:
    """Texts and tokens up to where each ends."""
    tokens = [row[:real] for row, real in zip(new_sn.tolist(), until_end(lm, new_sn).sum(1).tolist())]  # host sync
    return [lm.tokenizer.decode(row, skip_special_tokens=True) for row in tokens], tokens


def continuations(setup: ComparisonSetup, arm: Arm, coefficient: float, samples: int) -> Continuations | str:
    """Of every prompt, of one seed for every arm; or the sentence why there is no text."""
    lm = setup.lm
    new_sn = _written(setup, arm, coefficient, setup.prompts, samples)
    if isinstance(new_sn, str):
        return new_sn
    plain_sp, plain_mask_sp = (t.repeat_interleave(samples, 0) for t in lm.encode(setup.prompts))
    nats_p = [
        continuation_loss(lm, ids, new, mask)
        for ids, new, mask in zip(plain_sp.split(samples), new_sn.split(samples), plain_mask_sp.split(samples))
    ]
    return Continuations(*_until_end(lm, new_sn), np.array(nats_p))


def level(
    setup: ComparisonSetup, calibration: Calibration, continued: Continuations | str, off_topic: Divergence, none_p: np.ndarray
) -> dict[str, Any]:
    """One strength of an arm. Gains are over no steering on the same prompts; all but "choose" is of the scoring half."""
    entry: dict[str, Any] = calibration._asdict() | {"budget": calibration.budget or None}
    entry |= {"failure": None, "off_topic_kl": off_topic.kl, "top1_flips": off_topic.top1_flips}
    if isinstance(continued, str):
        names = ("choose", "score", "nats_per_token", "distinct_2", "longest_repeat")
        return entry | dict.fromkeys(names) | {"failure": continued, "texts": []}
    target_s = setup.target.score(continued.texts)
    target_p = _by_prompt(setup, target_s)
    gain_p = target_p - none_p
    second = None
    if setup.second is not None:
        second = mean_estimate(_by_prompt(setup, setup.second.score(continued.texts))[1::2], setup.seed)
    half_s = [HALVES[number // setup.samples % 2] for number in range(len(continued.texts))]
    scored = [row for row, half in zip(continued.tokens, half_s) if half == "score"]
    return entry | {
        "choose": {"target": float(target_p[::2].mean()), "gain": float(gain_p[::2].mean())},
        "score": {
            "target": mean_estimate(target_p[1::2], setup.seed),
            "gain": mean_estimate(gain_p[1::2], setup.seed),
            "second_target": second,
        },
        "nats_per_token": mean_estimate(continued.nats_p[1::2], setup.seed),
        "distinct_2": distinct_2(scored),
        "longest_repeat": float(np.mean([longest_repeat(row) for row in scored])),
        "texts": [
            {"prompt": setup.prompts[number // setup.samples], "half": half, "text": text, "target": float(target)}
            for number, (text, half, target) in enumerate(zip(continued.texts, half_s, target_s))
        ],
    }


def _by_prompt(setup: ComparisonSetup, value_s: np.ndarray) -> np.ndarray:
    return value_s.reshape(-1, setup.samples).mean(1)


def off_topic(setup: ComparisonSetup, arm: Arm, coefficient: float) -> Divergence:
    """Measures on the sentences that are not used for calibration. For plain prompting: the effect of the prompt on the text after it."""
    lm, texts = setup.lm, setup.off_topic
    if arm.vector is not None:
        return texts.divergence([(arm.vector, coefficient)])
    if not arm.prefix:
        return Divergence(0.0, 0.0)
    before_11p, _ = lm.encode([arm.prefix.rstrip()])
    parts = []
    for row, mask in zip(texts.ids_sp, texts.mask_sp):
        own = row[mask.bool()][lm.bos_id is not None :]
        ids_sp = torch.cat([before_11p[0], own])[None, : lm.context]
        parts.append(log_probs(lm, ids_sp, torch.ones_like(ids_sp))[before_11p.shape[1] - (lm.bos_id is not None) :])
    return divergence(texts.unsteered_nv, torch.cat(parts))


def _broken(setup: ComparisonSetup, arm: Arm, breaking: Calibration) -> dict[str, Any]:
    """The first prompts, continued at a strength that breaks the text."""
    prompts = setup.prompts[:BROKEN_PROMPTS]
    new_sn = _written(setup, arm, breaking.coefficient, prompts, 1)
    entry = {"method": arm.method, **breaking._asdict(), "failure": new_sn if isinstance(new_sn, str) else None}
    texts = [] if isinstance(new_sn, str) else _until_end(setup.lm, new_sn)[0]
    return entry | {"texts": [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)]}


def detection_auroc(setup: ComparisonSetup, vector: SteeringVector | None) -> Estimate | None:
    """AUROC over held-out texts of the mean projection of their tokens; None for directions per position and where there are no texts."""
    if vector is None or any(d.ndim == 2 for d in vector.directions.values()) or not all(setup.held):
        return None

    means = setup.held_means(list(vector.directions))

    def projected(side: int) -> np.ndarray:
        return sum((means[site][side] @ direction.cpu()).double() for site, direction in vector.directions.items()).numpy()  # type: ignore[union-attr]

    return auroc_estimate(projected(0), projected(1), setup.seed)
