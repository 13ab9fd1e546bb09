"""One way to use the dictionary, measured on the recorded rows: first on every eighth, and on all of them on request.

r rounds of the bootstrap · s sequences
"""

from functools import cached_property

import numpy as np

from sae.evaluation.check.alternatives import Use
from sae.evaluation.check.fit import Fit, fit, random_fvu
from sae.evaluation.check.recording import Recorder
from sae.statistics import data_and_resamples, percentile_interval

SCREEN = 8
"""the first measurement uses one row in this many"""
FITS = 0.75
"""a dictionary fits when its FVU is below this many times that of random directions"""
ROUNDS = 1000


class Sample:
    """Shared by all trials: the rows, and which sequences each round of the bootstrap draws."""

    def __init__(self, recorder: Recorder, seed: int):
        self.recorder = recorder
        self.weight_rs = data_and_resamples(len(recorder.sequences), np.random.default_rng(seed), ROUNDS)
        """the data as they are, then the rounds"""

    def fit(self, use: Use, step: int = 1) -> Fit:
        """On one row of `step`."""
        recorder = self.recorder
        rows = (~recorder.massive_n & (recorder.position_n >= use.first)).nonzero()[::step, 0]
        x_nd = recorder.values(use.reads)[rows]
        y_no = x_nd if use.reads == use.writes else recorder.values(use.writes)[rows]
        return fit(use.dictionary, x_nd, y_no, recorder.sequence_n[rows], len(recorder.sequences))


class Trial:
    """`fit` and its results are of all rows, `screened` of every eighth."""

    def __init__(self, use: Use, sample: Sample):
        self.use, self.sample = use, sample

    @cached_property
    def screened(self) -> Fit:
        return self.sample.fit(self.use, SCREEN)

    @cached_property
    def fit(self) -> Fit:
        return self.sample.fit(self.use)

    @property
    def measured(self) -> bool:
        """On all rows."""
        return "fit" in vars(self)

    @property
    def fvu(self) -> float:
        return float(self.fit.fvu(self.sample.weight_rs[:1])[0])

    @property
    def l0(self) -> float:
        return float(self.fit.l0(self.sample.weight_rs[:1])[0])

    @property
    def screened_fvu(self) -> float:
        return float(self.screened.fvu(self.sample.weight_rs[:1])[0])

    @cached_property
    def random_fvu(self) -> float:
        """FVU of random directions with as many active features."""
        y_no = self.sample.recorder.values(self.use.writes)[~self.sample.recorder.massive_n]
        return random_fvu(y_no, self.use.dictionary.d_sae, self.l0)

    @cached_property
    def fits(self) -> bool:
        """Its FVU is clearly below that of random directions."""
        return percentile_interval(self.fit.fvu(self.sample.weight_rs[1:]))[1] < FITS * self.random_fvu

    @property
    def margin(self) -> float:
        """The margin by which the last change must win; for two changes the smaller."""
        return min(change.clear for change in self.use.changes)

    def minus(self, other: "Trial") -> tuple[float, float]:
        """Interval of the difference of FVUs, over the same drawn sequences."""
        weight_rs = self.sample.weight_rs[1:]
        return percentile_interval(self.fit.fvu(weight_rs) - other.fit.fvu(weight_rs))
