"""The findings of a sweep by fixed rules: what crosses its limit first, and which predictions of the isotropic null model hold.

The limits are conventions, defined only here; a crossing lies between two strengths of the grid, by interpolation over log rho.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

WALL = 1.0  # nats per token of KL at which a model counts as broken
KL_SIGN = "KL of the predictions, nats"
UNUSUAL = "share of tokens beyond 99 % of neutral ones"

Value = Callable[[dict[str, Any], dict[str, Any]], float | None]
"""of a row of the arm "added", and the whole result"""


SATURATED = 1 / 3
"""d log KL / d log c below which a KL has stopped growing: a tenth more for a third more strength"""


class Sign(NamedTuple):
    name: str
    beyond: str
    """a sentence about strengths after the crossing"""
    value: Value
    limit: float
    above: bool = True
    """whether it is crossed from below"""
    of_text: bool = False
    """whether it needs the text that the model writes"""


class Finding(NamedTuple):
    """A prediction of the null model: tokens without any structure after a norm."""

    prediction: str
    held: bool | None
    """None if the sweep does not decide it"""
    numbers: dict[str, float | None]


def _layers(row: dict[str, Any]) -> list[dict[str, Any]]:
    return row.get("inside", {}).get("layers", [])


def _most(values: Iterable[float | None]) -> float | None:
    """None if there is none."""
    return max((value for value in values if value is not None and not math.isnan(value)), default=None)


def _streams(row: dict[str, Any], name: str) -> list[float | None]:
    return [layer["stream"].get("steered", {}).get(name) for layer in _layers(row)]


def _behind(row: dict[str, Any], result: dict[str, Any], name: str) -> float | None:
    """Of the first norm's output, steered over unsteered."""
    kind, _, number = (result["first_norm"] or "").partition(".")
    for layer in _layers(row):
        if str(layer["layer"]) == number and kind in layer:
            before, after = layer[kind]
            return after[name] / before[name] if before[name] else None
    return None


def _text(row: dict[str, Any], result: dict[str, Any], name: str) -> tuple[float | None, float | None]:
    return row.get("text", {}).get(name), result["unsteered_text"].get(name)


def _distinct(row: dict[str, Any], result: dict[str, Any]) -> float | None:
    now, before = _text(row, result, "distinct_2")
    return now / before if now is not None and before else None


def _added_nats(row: dict[str, Any], result: dict[str, Any]) -> float | None:
    now, before = _text(row, result, "nats_per_token")
    return now - before if now is not None and before is not None else None


def _pattern_kl(row: dict[str, Any]) -> float | None:
    heads = [layer["attention_kl_h"] for layer in _layers(row) if layer.get("attention_kl_h")]
    return _most(sum(kl_h) / len(kl_h) for kl_h in heads)


def _least_gain(row: dict[str, Any]) -> float | None:
    gains = [gain for gain in row.get("inside", {}).get("norm_gain", {}).values() if gain is not None]
    return min(gains, default=None)


SIGNS = (
    Sign(
        "norm of the stream over the unsteered one, at any layer",
        "the stream is twice as long as without steering",
        lambda row, _: _most(_streams(row, "norm_ratio")),
        2.0,
    ),
    Sign(
        "cosine of the stream and v, at any layer",
        "the stream is little else than the direction",
        lambda row, _: _most(_streams(row, "cos_v")),
        0.9,
    ),
    Sign(
        "smallest gain of a norm",
        "a norm makes everything but the direction half as large",
        lambda row, _: _least_gain(row),
        0.5,
        above=False,
    ),
    Sign(
        "token share behind the first norm, over the unsteered one",
        "the next block sees tokens half as different",
        lambda row, r: _behind(row, r, "token_share"),
        0.5,
        above=False,
    ),
    Sign(
        "effective rank behind the first norm, over the unsteered one",
        "the next block sees tokens that differ in half as many ways",
        lambda row, r: _behind(row, r, "effective_rank"),
        0.5,
        above=False,
    ),
    Sign("KL of a layer's attention patterns, nats", "attention looks elsewhere", lambda row, _: _pattern_kl(row), 1.0),
    Sign(
        UNUSUAL,
        "most tokens are unlike those of plain text",
        lambda row, _: _most(one["beyond_p99"] for one in _layers(row)),
        0.5,
    ),
    Sign(
        "overlap of the likeliest tokens with the logit lens of v",
        "the model predicts what the direction alone says",
        lambda row, _: row.get("logits", {}).get("lens_overlap"),
        0.5,
    ),
    Sign(KL_SIGN, "the predictions are broken", lambda row, _: row.get("logits", {}).get("kl"), WALL),
    Sign("distinct-2 of the text over the unsteered one", "the text repeats itself", _distinct, 0.5, above=False, of_text=True),
    Sign("nats per token of the text above the unsteered one", "the text is unlikely", _added_nats, 1.0, of_text=True),
)


def crossing(points: list[tuple[float, float | None]], limit: float, *, above: bool = True) -> float | None:
    """The rho at which values first cross `limit`, by interpolation over log rho; the first rho if it is beyond; None if none is."""
    before: tuple[float, float] | None = None
    for rho, value in points:
        if value is None or math.isnan(value):
            continue
        if value >= limit if above else value <= limit:
            if before is None or math.isinf(value):
                return rho
            share = (limit - before[1]) / (value - before[1])
            return math.exp(math.log(before[0]) + share * math.log(rho / before[0]))
        before = (rho, value)
    return None


def crossings(result: dict[str, Any]) -> dict[str, float | None]:
    """For every sign the rho at which the arm "added" crosses its limit, the first ones first; None, at the end, for those that do not."""
    rows = [row for row in result["rows"] if row["arm"] == "added"]
    found = {sign.name: crossing([(row["rho"], sign.value(row, result)) for row in rows], sign.limit, above=sign.above) for sign in SIGNS}
    return dict(sorted(found.items(), key=lambda item: math.inf if item[1] is None else item[1]))


def predictions(result: dict[str, Any]) -> list[Finding]:
    """The null model's five, the first in two parts, each held or failed by a rule on this one direction; that of several layers is left
    open."""
    walls = {name: wall["rho"] if wall["reached"] else None for name, wall in result["walls"].items()}
    wall, random, rotated = walls["added"], walls.get("random"), result["restored"].get("rotated")
    front = result["slopes"].get("front", [])[-1:]
    growth = front[0] if front and front[0] is not None and math.isfinite(front[0]) else None
    last: dict[str, Any] = next((row for row in reversed(result["rows"]) if row["arm"] == "added" and _layers(row)), {})
    cosine = _streams(last, "cos_v")[-1] if last else None
    taken = _most(layer[kind]["taken_back"] for layer in _layers(last) for kind in ("attn_out", "mlp_out") if kind in layer)
    return [
        Finding("added everywhere, the model breaks at rho 1 to 4", None if wall is None else 1 <= wall <= 4, {"wall": wall}),
        Finding(
            "added in front alone, the KL stops growing",
            None if growth is None else growth < SATURATED,
            {"front's slope, d log KL / d log c, at the largest rho": growth},
        ),
        Finding("late layers break at smaller rho than early ones", None, {}),
        Finding(
            "turning the stream to the same angle at its old length does the same damage",
            None if rotated is None else abs(rotated["value"]) < 0.25,
            {} if rotated is None else {"share restored": rotated["value"], "low": rotated["low"], "high": rotated["high"]},
        ),
        Finding(
            "a random direction breaks the model at the same rho",
            None if wall is None or random is None else 0.8 <= random / wall <= 1.25,
            {"wall": wall, "random direction's wall": random},
        ),
        Finding(
            "the blocks cannot undo the vector: none takes back a tenth of it, and the cosine stays above 0.9 to the end",
            None if taken is None or cosine is None else taken < 0.1 and cosine > 0.9,
            {"most that one takes back": taken, "cosine behind the last block": cosine},
        ),
    ]
