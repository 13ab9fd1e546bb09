"""How far to go along a direction: the coefficient at which steering changes the model's predictions by a given amount.

Equal coefficients of two directions are not equally strong; equal KL is. s sequences · p positions · n real positions · v vocabulary
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sae.activations.harvest.massive import is_massive
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.resumed import Resumed, first_block
from sae.text_input import text_list
from steering.intervention import steered
from steering.vector import SteeringVector

Vectors: TypeAlias = Sequence[SteeringVector | tuple[SteeringVector, float]]

BATCH = 16
ROWS = 8  # of log-probabilities that are worked on at a time
TOKENS = 64  # of each text are read
START, MOST = 0.3, 300.0  # first and largest rho that is tried
TOLERANCE = 0.03  # relative, of a KL that counts as the budget
EVALUATIONS = 30


class KLSearch(NamedTuple):
    """The result of `coefficient_for_kl`."""

    coefficient: float
    kl: float
    """at this coefficient; `inf` if it is finite nowhere"""
    reached: bool
    """whether `kl` is the budget within the tolerance; else it is the nearest that was found, from below if there is one"""
    monotone: bool
    """whether a larger coefficient never had a smaller KL among those that were tried"""
    tried: list[tuple[float, float]]
    """coefficients and their KL, in the order of trying"""


class Calibration(NamedTuple):
    """A direction at one budget."""

    budget: float
    """nats per token asked for"""
    coefficient: float
    kl: float
    """nats per token at that coefficient, on the texts of the calibration"""
    rho: float
    """coefficient · ‖v‖ / median ‖h‖ at the site, the largest over sites and positions of the vector"""
    max_activations: float | None
    """coefficient · ‖v‖ in units of the direction's own highest occurrence; None if it has none (several sites or positions)"""
    reached: bool
    monotone: bool


class Divergence(NamedTuple):
    kl: float
    """mean over positions of KL(unsteered ‖ steered), nats"""
    top1_flips: float
    """share of positions at which another token is the likeliest"""


def coefficient_for_kl(
    kl_at: Callable[[float], float],
    budget: float,
    *,
    start: float = 1.0,
    most: float = math.inf,
    tolerance: float = TOLERANCE,
    evaluations: int = EVALUATIONS,
) -> KLSearch:
    """The coefficient c > 0 with `kl_at(c)` = `budget`, by few evaluations of it.

    KL is about c²/2 · v'Fv near 0, so a first step assumes slope 2 of log KL in log c; once the budget lies between two coefficients,
    the Illinois rule (a secant that halves the weight of an end that stays) finds it, and bisection where an end is 0 or not finite. A
    KL that is not a number counts as infinite: such a coefficient is too large. Where KL jumps over the budget, or stays below it up to
    `most` (directions that saturate), `reached` is False. Where it is not monotone, the crossing found is one of several.
    """
    if not (math.isfinite(budget) and budget > 0 and math.isfinite(start) and 0 < start <= most):
        raise InputError(f"expected a KL budget above 0 and a start above 0 up to {most:g}, got {budget} and {start}")
    tried: list[tuple[float, float]] = []
    low: tuple[float, float] | None = None  # (log c, log of KL / budget) below the budget
    high: tuple[float, float] | None = None
    side, coefficient, factor = 0, start, 1.2
    while len(tried) < evaluations:
        kl = kl_at(coefficient)
        kl = math.inf if math.isnan(kl) else kl
        tried.append((coefficient, kl))
        if abs(kl / budget - 1) <= tolerance:
            return KLSearch(coefficient, kl, True, _monotone(tried, budget), tried)
        point = (math.log(coefficient), math.log(kl / budget) if kl > 0 else -math.inf)
        now = 1 if kl > budget else -1
        if now > 0:
            high, low = point, low and (low[0], low[1] / 2 if now == side else low[1])
        else:
            low, high = point, high and (high[0], high[1] / 2 if now == side else high[1])
        side = now
        if low and high:
            if high[0] - low[0] < 1e-4:
                break
            coefficient = math.exp(_between(low, high))
        elif low and coefficient >= most:
            break
        else:
            guess = math.exp(min(abs(point[1]) / 2, 3.0))
            coefficient = min(most, coefficient * max(guess, factor) ** -side)
            factor = min(factor**2, 16.0)
    best = min(tried, key=lambda pair: (math.isinf(pair[1]), pair[1] > budget, abs(pair[1] - budget), pair[0]))
    return KLSearch(*best, False, _monotone(tried, budget), tried)


def _between(low: tuple[float, float], high: tuple[float, float]) -> float:
    """The zero of the line through both points; their middle if there is no such line. Never at an end."""
    (x0, y0), (x1, y1) = low, high
    share = y0 / (y0 - y1) if math.isfinite(y0) and math.isfinite(y1) else 0.5
    return x0 + min(max(share, 0.02), 0.98) * (x1 - x0)


def _monotone(tried: list[tuple[float, float]], budget: float) -> bool:
    kls = [kl for _, kl in sorted(tried)]
    return all(after >= before - 1e-3 * budget for before, after in pairwise(kls))


def typical_norm(h_nd: Tensor) -> float:
    """Median ‖h‖ of the rows that are not massive; pass none of beginning-of-text. Raises `InputError` for no or zero rows."""
    norm_n = h_nd.double().norm(dim=-1)
    norm_n = norm_n[~is_massive(norm_n)]
    median = float(norm_n.median()) if len(norm_n) else 0.0  # host sync
    if not median > 0:
        raise InputError("expected activations of tokens besides beginning-of-text that are not zero, got none; give longer texts")
    return median


def encode_cut(lm: LanguageModel, texts: Sequence[str], tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """`lm.encode` of the first tokens of each text, as many as `tokens` and the model's context allow."""
    texts = text_list(texts)
    if not texts:
        raise InputError("expected texts to read, got none")
    rows = [lm.encode([text])[0][0, : min(tokens, lm.context)] for text in texts]
    pads = [max(map(len, rows)) - len(row) for row in rows]
    ids_sp = torch.stack([torch.nn.functional.pad(row, (pad, 0), value=lm.pad_id) for row, pad in zip(rows, pads)])
    mask_sp = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (pad, 0)) for row, pad in zip(rows, pads)])
    return ids_sp, mask_sp


@torch.no_grad()
def log_probs(lm: LanguageModel, ids_sp: Tensor, mask_sp: Tensor) -> Tensor:
    """Log-probabilities of the next token at every real position, float32 [n, v]; inside `steered`, those of the steered model."""
    batches = zip(ids_sp.split(BATCH), mask_sp.split(BATCH))
    return torch.cat([rows_nv for ids, mask in batches for rows_nv in _log_probs_of_rows(lm.logits(ids, mask), mask)])


def _log_probs_of_rows(logits_spv: Tensor, mask_sp: Tensor) -> Iterator[Tensor]:
    """Of the real positions, float32, a few at a time so that they stay in the processor's cache."""
    for rows_nv in logits_spv[mask_sp.bool().to(logits_spv.device)].split(ROWS):
        yield rows_nv.float().log_softmax(-1)


def divergence(unsteered_nv: Tensor, steered_nv: Tensor) -> Divergence:
    """Between two tables of `log_probs`; NaN where the steered one is not finite."""
    return _divergence(unsteered_nv, steered_nv.split(ROWS))


def _divergence(unsteered_nv: Tensor, steered: Iterable[Tensor]) -> Divergence:
    """`steered` are the rows of the second table in their order, some at a time."""
    kl, flips, done = [], [], 0
    for steered_nv in steered:
        before_nv = unsteered_nv[done : done + len(steered_nv)]
        kl.append((before_nv.exp() * (before_nv - steered_nv)).sum(-1))
        flips.append(before_nv.argmax(-1) != steered_nv.argmax(-1))
        done += len(steered_nv)
    return Divergence(torch.cat(kl).double().mean().item(), torch.cat(flips).double().mean().item())  # host sync


class SteeredTexts:
    """Fixed texts, to be read under many vectors; blocks below those of the vectors run once."""

    def __init__(self, lm: LanguageModel, ids_sp: Tensor, mask_sp: Tensor):
        self.lm, self.ids_sp, self.mask_sp = lm, ids_sp, mask_sp
        self._resumed: dict[int, list[Resumed]] = {}

    @cached_property
    def unsteered_nv(self) -> Tensor:
        """`log_probs` of the texts."""
        return log_probs(self.lm, self.ids_sp, self.mask_sp)

    def log_probs(self, vectors: Vectors) -> Tensor:
        """The same under `vectors`, added everywhere (or where their own positions are)."""
        return torch.cat(list(self._steered(vectors)))

    def divergence(self, vectors: Vectors) -> Divergence:
        """Of the steered predictions from the unsteered ones."""
        return _divergence(self.unsteered_nv, self._steered(vectors))

    @torch.no_grad()
    def _steered(self, vectors: Vectors) -> Iterator[Tensor]:
        sites = {site for entry in vectors for site in (entry[0] if isinstance(entry, tuple) else entry).directions}
        batches = self._batches(sorted(sites))
        with steered(self.lm, vectors):
            for batch, mask in zip(batches, self.mask_sp.split(BATCH)):
                yield from _log_probs_of_rows(batch.logits(), mask)

    def _batches(self, sites: Sequence[str]) -> list[Resumed]:
        first = first_block(self.lm, sites)
        if first not in self._resumed:
            batches = zip(self.ids_sp.split(BATCH), self.mask_sp.split(BATCH))
            self._resumed[first] = [Resumed(self.lm, ids, mask, sites) for ids, mask in batches]
        return self._resumed[first]


def kl_per_token(lm: LanguageModel, ids_sp: Tensor, mask_sp: Tensor, vectors: Vectors) -> float:
    """Mean over real positions of KL(unsteered ‖ steered), nats, with `vectors` added everywhere (or where their own positions are)."""
    return SteeredTexts(lm, ids_sp, mask_sp).divergence(vectors).kl


class Calibrator:
    """Neutral texts, on which the strengths of many directions are set; their first `tokens` tokens are read."""

    def __init__(self, lm: LanguageModel, texts: Sequence[str], tokens: int = TOKENS):
        self.lm, self.texts = lm, SteeredTexts(lm, *encode_cut(lm, texts, tokens))
        self._values: dict[str, Tensor] = {}

    def values(self, sites: Sequence[str]) -> dict[str, Tensor]:
        """Activations of the texts' tokens but for beginning-of-text, whose norm is often far from any other's: float32 [n, d] each."""
        ids_sp, mask_sp = self.texts.ids_sp, self.texts.mask_sp
        real_sp = (mask_sp.bool() & (mask_sp.cumsum(1) > (self.lm.bos_id is not None))).cpu()
        if not real_sp.any():  # host sync
            raise InputError("expected texts with a token besides beginning-of-text, got none")
        if missing := [site for site in sites if site not in self._values]:
            found = self.lm.record(ids_sp, missing, mask_sp)
            self._values |= {site: found[site].float().cpu()[real_sp] for site in missing}  # host sync
        return {site: self._values[site] for site in sites}


class DirectionStrength:
    """The coefficients of one direction at KL budgets; every KL that was measured serves the budgets that follow."""

    def __init__(self, calibrator: Calibrator, vector: SteeringVector, strongest: float | None = None):
        """Raises `InputError` for a zero vector and for one of another width."""
        vector.unit()  # refuses a zero vector
        with steered(calibrator.lm, [vector]):  # refuses another width
            pass
        self.vector, self.texts = vector, calibrator.texts
        self.rho_of_1, projection = _scale(vector, calibrator.values(list(vector.directions)))
        self.strongest = projection if strongest is None else strongest
        self._kl: dict[float, float] = {}
        self._start = START / self.rho_of_1

    def at(self, budget: float, tolerance: float = TOLERANCE) -> Calibration:
        """Where the KL is `budget` nats per token, within the relative tolerance; coefficients up to rho = 300 are tried."""
        found = coefficient_for_kl(self._kl_at, budget, start=self._start, most=MOST / self.rho_of_1, tolerance=tolerance)
        c = found.coefficient
        self._start = c if found.reached else START / self.rho_of_1
        units = c * self.vector.norm / self.strongest if self.strongest else None
        return Calibration(budget, c, found.kl, c * self.rho_of_1, units, found.reached, found.monotone)

    def _kl_at(self, coefficient: float) -> float:
        if coefficient not in self._kl:
            self._kl[coefficient] = self.texts.divergence([(self.vector, coefficient)]).kl
        return self._kl[coefficient]


def calibrate(
    lm: LanguageModel,
    vector: SteeringVector,
    budgets: Sequence[float],
    texts: Sequence[str],
    *,
    strongest: float | None = None,
    tokens: int = TOKENS,
) -> list[Calibration]:
    """The coefficient of `vector` at each budget of `kl_per_token` on the first `tokens` tokens of `texts`, which should be off its topic.

    `strongest` is the length of the direction's highest natural occurrence: a feature's maximum activation times the norm of its
    decoder row. By default it is the largest projection on the texts. Coefficients up to rho = 300 are tried. Raises `InputError` for
    a zero vector and for one of another width.
    """
    strength = DirectionStrength(Calibrator(lm, texts, tokens), vector, strongest)
    return [strength.at(budget) for budget in budgets]


def _scale(vector: SteeringVector, values: Mapping[str, Tensor]) -> tuple[float, float | None]:
    """rho of coefficient 1, and the largest projection of the values if the vector is one direction and it is above 0."""
    rhos, projection = [], 0.0
    for site, direction in vector.directions.items():
        rhos.append((direction.cpu().norm(dim=-1).max() / values[site].norm(dim=-1).median()).item())
        projection = (values[site] @ direction.cpu()).max().item() / vector.norm if direction.ndim == 1 else 0.0
    return max(rhos), projection if len(rhos) == 1 and projection > 0 else None
