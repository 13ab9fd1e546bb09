"""How far to go along a direction: the coefficient at which steering changes the model's predictions by a given amount.

Equal coefficients of two directions are not equally strong; equal KL is. s sequences · p positions · n real positions · v vocabulary
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sae.activations.harvest.massive import is_massive
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.text_input import text_list
from steering.intervention import steered
from steering.vector import SteeringVector

BATCH = 16
TOKENS = 64  # of each text are read
START, MOST = 0.3, 300.0  # first and largest rho that is tried
TOLERANCE = 0.03  # relative, of a KL that counts as the budget
EVALUATIONS = 30


class KLSearch(NamedTuple):
    """What `coefficient_for_kl` gives."""

    coefficient: float
    kl: float
    """there; `inf` if nowhere finite"""
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
    """coefficient · ‖v‖ in units of the direction's own highest occurrence; None where it has none (several sites or positions)"""
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
    """Where the line through both points is 0; their middle where there is no such line. Never at an end."""
    (x0, y0), (x1, y1) = low, high
    share = y0 / (y0 - y1) if math.isfinite(y0) and math.isfinite(y1) else 0.5
    return x0 + min(max(share, 0.02), 0.98) * (x1 - x0)


def _monotone(tried: list[tuple[float, float]], budget: float) -> bool:
    kls = [kl for _, kl in sorted(tried)]
    return all(after >= before - 1e-3 * budget for before, after in pairwise(kls))


def typical_norm(h_nd: Tensor) -> float:
    """Median ‖h‖ of the rows that are not massive; give none of beginning-of-text. Raises `InputError` for no or zero rows."""
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
    parts = []
    for ids, mask in zip(ids_sp.split(BATCH), mask_sp.split(BATCH)):
        logits_spv = lm.logits(ids, mask)
        parts.append(logits_spv[mask.bool().to(logits_spv.device)].float().log_softmax(-1))
    return torch.cat(parts)


def divergence(unsteered_nv: Tensor, steered_nv: Tensor) -> Divergence:
    """Between two tables of `log_probs`; NaN where the steered one is not finite."""
    kl_n = (unsteered_nv.exp() * (unsteered_nv - steered_nv)).sum(-1)
    flips_n = unsteered_nv.argmax(-1) != steered_nv.argmax(-1)
    return Divergence(kl_n.double().mean().item(), flips_n.double().mean().item())  # host sync


def kl_per_token(
    lm: LanguageModel, ids_sp: Tensor, mask_sp: Tensor, vectors: Sequence[SteeringVector | tuple[SteeringVector, float]]
) -> float:
    """Mean over real positions of KL(unsteered ‖ steered), nats, with `vectors` added everywhere (or where their own positions are)."""
    unsteered_nv = log_probs(lm, ids_sp, mask_sp)
    with steered(lm, vectors):
        return divergence(unsteered_nv, log_probs(lm, ids_sp, mask_sp)).kl


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
    decoder row. Without it, it is the largest projection on the texts. Coefficients up to rho = 300 are tried. Raises `InputError` for
    a zero vector and for one of another width.
    """
    vector.unit()  # refuses a zero vector
    with steered(lm, [vector]):  # refuses another width
        pass
    ids_sp, mask_sp = encode_cut(lm, texts, tokens)
    rho_of_1, projection = _scale(lm, vector, ids_sp, mask_sp)
    strongest = projection if strongest is None else strongest
    unsteered_nv = log_probs(lm, ids_sp, mask_sp)

    def kl_at(coefficient: float) -> float:
        with steered(lm, [(vector, coefficient)]):
            return divergence(unsteered_nv, log_probs(lm, ids_sp, mask_sp)).kl

    found = []
    start, most = START / rho_of_1, MOST / rho_of_1
    for budget in budgets:
        c, kl, reached, monotone, _ = coefficient_for_kl(kl_at, budget, start=start, most=most)
        units = c * vector.norm / strongest if strongest else None
        found.append(Calibration(budget, c, kl, c * rho_of_1, units, reached, monotone))
        start = c if reached else START / rho_of_1
    return found


def _scale(lm: LanguageModel, vector: SteeringVector, ids_sp: Tensor, mask_sp: Tensor) -> tuple[float, float | None]:
    """rho of coefficient 1, and the largest projection on the texts' tokens if the vector is one direction and it is above 0.

    The beginning-of-text token, whose norm is often far from any other's, counts in neither.
    """
    recorded = lm.record(ids_sp, list(vector.directions), mask_sp)
    real_sp = mask_sp.bool() & (mask_sp.cumsum(1) > (lm.bos_id is not None))
    if not real_sp.any():  # host sync
        raise InputError("expected texts with a token besides beginning-of-text, got none")
    rhos, projection = [], 0.0
    for site, direction in vector.directions.items():
        h_nd = recorded[site].float().cpu()[real_sp.cpu()]  # host sync
        rhos.append((direction.cpu().norm(dim=-1).max() / h_nd.norm(dim=-1).median()).item())
        projection = (h_nd @ direction.cpu()).max().item() / vector.norm if direction.ndim == 1 else 0.0
    return max(rhos), projection if len(rhos) == 1 and projection > 0 else None
