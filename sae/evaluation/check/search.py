"""Finds the alternative that fits best, and whether it is clearly better than the declared use.

After a change that helps, further ones are tried on top of it; if nothing fits, pairs of changes and all layers are tried.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from sae.dictionaries.gates import Threshold
from sae.evaluation.check.alternatives import CLEAR_FITTED, Change, Use, alternatives, everywhere, is_near_1, points, scaled
from sae.evaluation.check.promises import Promises
from sae.evaluation.check.trial import Sample, Trial

FINALISTS = 6
"""measured on all rows, of those that are better on every eighth"""
CHANGES = 3
"""at most, one on top of the other"""
WORSE = 2.0
"""maximum factor of the FVU for an alternative that keeps a promised L0 that the declared use breaks"""
STEPS = np.arange(-8, 8.01, 0.5)
"""common factors that are tried before the best is refined, as powers of 2"""


class Search:
    def __init__(self, sample: Sample, promises: Promises):
        self.sample, self.promises = sample, promises
        self.tried: list[Trial] = []
        """everything in the order in which it was tried; first the declared use"""

    def run(self, declared: Use) -> list[Trial]:
        """The declared use, then what fits clearly better, each on top of the one before."""
        steps = [Trial(declared, self.sample)]
        self.tried.append(steps[0])
        while len(steps[-1].use.changes) < CHANGES:
            base = steps[-1]
            self.sample.recorder.record(points(base.use, self.sample.recorder))
            found = self.better(base, [*alternatives(base.use, self.sample.recorder), *self.fitted(base.use)])
            if found is None and not base.fits:
                found = self.better(base, self.farther(base.use))
            if found is None:
                break
            steps.append(found)
        return steps

    def farther(self, use: Use) -> Iterator[Use]:
        """Pairs of changes, and the same kind of site in all layers."""
        recorder = self.sample.recorder
        singles = alternatives(use, recorder)
        yield from everywhere(use, recorder)
        recorder.record(dict.fromkeys(point for one in singles for point in points(one, recorder)))
        order = list(dict.fromkeys(one.changes[-1].kind for one in singles))
        for one in singles:
            for two in alternatives(one, recorder):
                first, second = (order.index(change.kind) if change.kind in order else len(order) for change in two.changes[-2:])
                if first < second:
                    yield two

    def better(self, base: Trial, uses: Iterable[Use]) -> Trial | None:
        """The best of them that fits and is clearly better; the first of those that are as good within the interval."""
        trials = [Trial(use, self.sample) for use in uses]
        self.tried += trials
        limit = base.screened_fvu * (WORSE if self.breaks_promise(base) else 1)
        finalists = sorted((one for one in trials if one.screened_fvu < limit), key=lambda one: one.screened_fvu)[:FINALISTS]
        clear = [one for one in finalists if one.fits and self.is_clear(one, base)]
        if not clear:
            return None
        best = min(clear, key=lambda one: one.fvu / one.margin)
        return next(one for one in trials if one in clear and one.margin == best.margin and one.minus(best)[0] <= 0)

    def is_clear(self, one: Trial, base: Trial) -> bool:
        """A lower FVU by the margin of its change; where the base breaks its promised L0, one that keeps it may even be worse.

        A gate that lets other features fire must beat the base with a threshold that lets as many fire.
        """
        if self.breaks_promise(base) and not self.breaks_promise(one):
            return one.fvu <= WORSE * base.fvu
        if base.fits and any(change.gate for change in one.use.changes[len(base.use.changes) :]):
            base = self.with_l0(base, one)
        return one.fvu <= one.margin * base.fvu and one.minus(base)[1] < 0

    def breaks_promise(self, one: Trial) -> bool:
        return self.promises.broken_by(one.l0)

    def with_l0(self, base: Trial, other: Trial) -> Trial:
        """With its thresholds times the common factor with which about as many features fire as in the other."""

        def at(power: float) -> Trial:
            gate = base.use.dictionary.gate
            assert isinstance(gate, Threshold)
            factor_f = torch.full((base.use.dictionary.d_sae,), 2.0**power)
            return Trial(base.use.with_parts(Change("threshold", "a common factor"), gate=gate.scaled(factor_f)), self.sample)

        low, high, weight_1s = -10.0, 10.0, self.sample.weight_rs[:1]
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle).screened.l0(weight_1s) > other.screened.l0(weight_1s) else (low, middle)
        return at(low)

    def fitted(self, use: Use) -> Iterator[Use]:
        """With one more common factor of the activations, that which gives the lowest FVU on every eighth row, if it is far from 1."""

        def at(power: float) -> Use:
            factor = float(2.0**power)
            return scaled(use, factor, factor, Change("scale", f"activations × {factor:.4g}, by fit", CLEAR_FITTED))

        def fvu(power: float) -> float:
            return Trial(at(power), self.sample).screened_fvu

        values = [fvu(power) for power in STEPS]
        best = int(np.argmin(values))
        low, high = STEPS[max(best - 1, 0)], STEPS[min(best + 1, len(STEPS) - 1)]
        golden = (5**0.5 - 1) / 2
        for _ in range(8):
            a, b = high - golden * (high - low), low + golden * (high - low)
            low, high = (low, b) if fvu(a) < fvu(b) else (a, high)
        if not is_near_1(2 ** ((low + high) / 2)):
            yield at((low + high) / 2)
