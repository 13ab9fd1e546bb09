"""How strongly a direction can be added before the first sign of breaking, measured in a few passes without writing text."""

import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.resumed import Resumed
from sae.model.sites import parse_site
from steering.breakdown.arms import STREAM, Arm
from steering.breakdown.findings import SIGNS, UNUSUAL, WALL, crossing
from steering.breakdown.sweep import Setup, first_norm, make_setup, measured_row, run_pass, sites_inside, with_vector
from steering.circuits.model_graph.frozen import PARTS, internals
from steering.directions.random import random_direction
from steering.strength.neutral import MEASURED, OTHERS
from steering.vector import SteeringVector

RHOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""lengths of the added vector that are tried, in units of the stream, up to the first whose predictions are broken"""
BREAKING = tuple(sign for sign in SIGNS if not sign.of_text and sign.name != UNUSUAL)
"""the signs that end a range; tokens unlike those of neutral text appear long before the text breaks, so they are reported separately"""


class WorkingRange(NamedTuple):
    """Coefficients of the vector, above 0. None if no sign appeared up to the largest that was tried."""

    coefficient: float | None
    """the largest before the first sign of breaking crosses its limit (steering/breakdown/findings.py)"""
    sign: str | None
    """the name of that sign"""
    beyond: str | None
    """a sentence about strengths beyond it"""
    unusual: float | None
    """the coefficient at which half of the tokens are further from neutral text than 99 % of its own: usually much smaller"""
    tried: float
    """the largest that was tried"""
    rho_of_1: float
    """rho of coefficient 1"""

    def excludes(self, coefficient: float) -> bool:
        """Whether a strength is outside the range."""
        return self.coefficient is not None and coefficient > self.coefficient


class RangeFinder:
    """Working ranges of vectors at one site of the residual stream; everything that does not depend on the vector is measured once."""

    def __init__(self, lm: LanguageModel, site: str):
        """Raises `InputError` for a site that is not of the residual stream."""
        if parse_site(site, lm.n_layers).kind not in STREAM:
            raise InputError(f"expected a direction of the residual stream ({', '.join(STREAM)}), got one at {site}")
        anyone = random_direction(lm.width(site), site, 0)
        setup = make_setup(lm, anyone, MEASURED, OTHERS, [Arm("seen", anyone, frozen=_seen(lm))])
        with internals(lm, setup.parts):  # so that the blocks below run the attention code of the passes
            resumed = Resumed(lm, setup.ids_sp, setup.mask_sp, sites_inside(setup))
        self.setup: Setup = setup._replace(resumed=resumed)
        self.before = run_pass(self.setup, sites_inside(self.setup))

    def passes(self, vector: SteeringVector, rhos: Sequence[float] = RHOS) -> Generator[None, None, WorkingRange]:
        """Pauses after each steered pass, so that others can use the model in between; returns the range.

        Raises `InputError` for a zero vector, for one at another site, and for directions of more positions than a text has.
        """
        if vector.site != self.setup.vector.site:
            raise InputError(f"expected a vector at {self.setup.vector.site}, got one at {vector.site}")
        setup, rows = with_vector(self.setup, vector), []
        for size in rhos:
            row = measured_row(setup, self.before, Arm("added", vector), size)
            rows.append(row)
            yield
            if not (kl := row.get("logits", {}).get("kl", math.nan)) < WALL:
                row["logits"] = row.get("logits", {}) | {"kl": math.inf if math.isnan(kl) else kl}  # no predictions at all
                break
        result: dict[str, Any] = {"rows": rows, "first_norm": first_norm(setup.lm, vector.site)}
        found = {
            sign: at
            for sign in SIGNS
            if not sign.of_text
            and (at := crossing([(row["rho"], sign.value(row, result)) for row in rows], sign.limit, above=sign.above)) is not None
        }
        first = min((sign for sign in BREAKING if sign in found), key=lambda sign: found[sign], default=None)
        unusual = next((at for sign, at in found.items() if sign.name == UNUSUAL), None)
        return WorkingRange(
            coefficient=None if first is None else found[first] / setup.rho_of_1,
            sign=first and first.name,
            beyond=first and first.beyond,
            unusual=None if unusual is None else unusual / setup.rho_of_1,
            tried=rows[-1]["coefficient"],
            rho_of_1=setup.rho_of_1,
        )

    def of(self, vector: SteeringVector, rhos: Sequence[float] = RHOS) -> WorkingRange:
        """Runs all of `passes`."""
        passes = self.passes(vector, rhos)
        while True:
            try:
                next(passes)
            except StopIteration as done:
                return done.value


def working_range(lm: LanguageModel, vector: SteeringVector) -> WorkingRange:
    """The range of a vector added everywhere (or at its own positions) on neutral sentences; for −v pass `-vector`. Raises `InputError` as
    `RangeFinder` does."""
    return RangeFinder(lm, vector.site).of(vector)


def _seen(lm: LanguageModel) -> tuple[str, ...]:
    """The values that signs need from a pass, as far as the model shows them."""
    seen = []
    for part in PARTS:
        try:
            with internals(lm, (part,)):
                seen.append(part)
        except InputError:  # its signs have no value then, as in a sweep
            continue
    return tuple(seen)
