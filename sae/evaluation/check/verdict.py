"""Good, suspicious or wrong, by rules that are stated in docs/checking_a_dictionary.md."""

from typing import Any, NamedTuple

from sae.evaluation.check.promises import FACTOR, Promises
from sae.evaluation.check.trial import Trial

NORM_RATIOS = 0.5, 1.5
LEAST_RECOVERED = 0.5
TIMES_FVU = 2.0
"""an FVU of more than this many times the promised one breaks the promise"""


class Verdict(NamedTuple):
    word: str
    """good, suspicious or wrong"""
    reasons: list[str]
    """one sentence each"""


def judge(steps: list[Trial], promises: Promises, measures: dict[str, Any]) -> Verdict:
    """`steps` are the declared use and those that fit better; `measures` are those of the declared one, with intervals."""
    declared, best = steps[0], steps[-1]
    fvu, random = measures["fvu"], measures["random_fvu"]
    reasons = []
    wrong = not declared.fits
    if wrong:
        than = "no better than the mean" if fvu["low"] >= 1 else f"not clearly below the {random:.3g} of random directions"
        reasons.append(f"as declared it does not fit: FVU {fvu['value']:.3g} is {than}")
    if best is not declared:
        gain = f"FVU {best.fvu:.3g} instead of {declared.fvu:.3g}"
        reasons.append(f"what fits: {best.use.name} ({gain})")
    elif wrong:
        reasons.append("nothing near fits, so it was made for another model or another kind of site, or its weights are damaged")
    reasons += broken(promises, measures)
    return Verdict("wrong" if wrong else "suspicious" if reasons else "good", reasons)


def broken(promises: Promises, measures: dict[str, Any]) -> list[str]:
    """Measures that differ from what the source promises, or from those of working dictionaries."""
    reasons = []
    l0, fvu = promises.of("l0"), promises.of("fvu")
    if l0 and (measures["l0"]["high"] < l0.low / FACTOR or measures["l0"]["low"] > l0.high * FACTOR):
        reasons.append(f"L0 is {measures['l0']['value']:.3g}, where {l0.source} promises {range_text(l0.low, l0.high)}")
    if fvu and measures["fvu"]["low"] > TIMES_FVU * fvu.high:
        reasons.append(f"FVU is {measures['fvu']['value']:.3g}, where {fvu.source} promises {range_text(fvu.low, fvu.high)}")
    ratio, recovered = measures["norm_ratio"], measures["loss_recovered"]
    if ratio["high"] < NORM_RATIOS[0] or ratio["low"] > NORM_RATIOS[1]:
        reasons.append(f"outputs have {ratio['value']:.3g} times the norm of their targets")
    if recovered and recovered["high"] < LEAST_RECOVERED:
        reasons.append(f"loss recovered with the dictionary spliced in is {recovered['value']:.3g}")
    return reasons


def range_text(low: float, high: float) -> str:
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
