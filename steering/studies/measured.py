"""Measures of directions.

s prompts · r rounds of the bootstrap, the first being the original data · k directions
"""

from typing import NamedTuple

import numpy as np

from steering.vector import SteeringVector

COMPONENT, IN_SPAN, IN_SPAN_WEIGHTED, RANDOM = "component", "random in span", "random in span, by variance", "random"
TOP = 50  # tokens


class Direction(NamedTuple):
    group: str
    name: str
    unit: SteeringVector


class OneSign(NamedTuple):
    """One sign of a direction, at the coefficient of the budget."""

    coefficient: float
    rho: float
    """coefficient over the median norm at the site"""
    reached: bool
    """whether the calibration reached the budget's KL"""
    kl: float
    """nats per token, on the prompts"""
    cosine_ss: np.ndarray
    """mean cosine of the logit changes of two different prompts, over all pairs of their positions; the diagonal means nothing"""
    effective_tokens: float
    top_tokens: list[int]
    """ids, the most raised first"""


class DirectionResult(NamedTuple):
    plus: OneSign
    minus: OneSign
    linearity_s: np.ndarray

    @property
    def cosine_ss(self) -> np.ndarray:
        return (self.plus.cosine_ss + self.minus.cosine_ss) / 2

    @property
    def effective_tokens(self) -> float:
        return (self.plus.effective_tokens + self.minus.effective_tokens) / 2

    @property
    def sensitivity(self) -> float:
        """Nats per token over rho²: what a small step costs; KL grows with the square of the step."""
        return (self.plus.kl / self.plus.rho**2 + self.minus.kl / self.minus.rho**2) / 2


def consistency(cosine_ss: np.ndarray, weight_rs: np.ndarray) -> np.ndarray:
    """Mean of `cosine_ss` over pairs of different prompts, a prompt counting `weight_rs` times; [r].

    Two copies of one prompt are not a pair: their cosine would be high for any direction. NaN if only one prompt counts.
    """
    between_ss = cosine_ss - np.diag(np.diag(cosine_ss))
    pairs_r = weight_rs.sum(1) ** 2 - (weight_rs**2).sum(1)
    with np.errstate(invalid="ignore"):
        return ((weight_rs @ between_ss) * weight_rs).sum(1) / pairs_r
