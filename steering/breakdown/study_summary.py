"""The joint results of many directions of one model: numbers with intervals over directions and texts, and tables of them.

n directions · s texts · r rounds of the bootstrap
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sae.model.sites import parse_site
from sae.statistics import Estimate, data_and_resamples, estimate
from steering.breakdown.findings import SIGNS, predictions

Result = dict[str, Any]
"""of one direction, as `sae diagnose-breakdown` writes it, with its "kind" and "name"""

KL = "KL of the predictions, nats"


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Of all directions of a study, site by site."""
    by_site: dict[str, list[Result]] = {}
    for result in results:
        by_site.setdefault(result["site"], []).append(result)
    sites = sorted(by_site, key=lambda site: parse_site(site).layer)
    return {
        "sites": {site: of_site(by_site[site]) for site in sites},
        "late_layers": late_layers(by_site[sites[0]], by_site[sites[-1]]) if len(sites) > 1 else None,
    }


def of_site(results: Sequence[Result]) -> dict[str, Any]:
    kinds = dict.fromkeys(result["kind"] for result in results)
    return {
        "directions": len(results),
        "walls": {kind: walls([result for result in results if result["kind"] == kind]) for kind in kinds} | {"all": walls(results)},
        "restored": {
            arm: share
            for arm in dict.fromkeys(arm for result in results for arm in result["kl_of_texts_at_wall"] if arm != "added")
            if (share := restored_by(results, arm)) is not None
        },
        "signs": signs(results),
        "predictions": held(results),
        "random_over_others": ratio_of_walls(
            [result for result in results if result["kind"] == "random"], [result for result in results if result["kind"] != "random"]
        ),
        "lens": rank_correlation([result["lens_sharpness"] for result in results], [_wall(result) for result in results]),
    }


def _wall(result: Result) -> float:
    wall = result["walls"]["added"]
    return float(wall["rho"]) if wall["reached"] else math.nan


def walls(results: Sequence[Result]) -> dict[str, Any]:
    """Median rho at which "added" has the KL of the wall, with the interval over directions, and how many reach it."""
    rho_n = np.array([_wall(result) for result in results])
    rho_n = rho_n[np.isfinite(rho_n)]
    median = _over_directions(rho_n, np.median) if len(rho_n) else {"value": None, "low": None, "high": None}
    ends = (float(rho_n.min()), float(rho_n.max())) if len(rho_n) else (None, None)
    return {"reached": len(rho_n), "of": len(results), "median": median, "least": ends[0], "most": ends[1]}


def _over_directions(value_n: np.ndarray, statistic: Callable[[np.ndarray], Any]) -> Estimate:
    rng = np.random.default_rng(0)
    drawn = [statistic(value_n), *(statistic(value_n[rng.integers(0, len(value_n), len(value_n))]) for _ in range(2000))]
    return estimate(np.array(drawn, dtype=np.float64))


def restored_by(results: Sequence[Result], arm: str) -> dict[str, Any] | None:
    """1 − KL of the arm / KL of "added" at the direction's wall: the median of directions, which one that explodes does not move, with the
    interval over directions and texts, drawn apart; the least and the most of a direction; how many are not finite and left out. None where
    no direction at its wall has the arm."""
    chosen = [one["kl_of_texts_at_wall"] for one in results if math.isfinite(_wall(one)) and arm in one["kl_of_texts_at_wall"]]
    pairs = [[np.array(one[name], dtype=np.float64) for name in (arm, "added")] for one in chosen]
    finite = [pair for pair in pairs if np.isfinite(pair).all()]
    if not finite:
        return None
    arm_ns, added_ns = (np.stack(values) for values in zip(*finite))
    n, rng = len(arm_ns), np.random.default_rng(0)
    weight_rs = data_and_resamples(arm_ns.shape[1], rng)
    share_rn = 1 - (weight_rs @ arm_ns.T) / (weight_rs @ added_ns.T)
    drawn_rn = np.concatenate([np.arange(n)[None], rng.integers(0, n, (len(share_rn) - 1, n))])
    median = estimate(np.median(np.take_along_axis(share_rn, drawn_rn, axis=1), axis=1))
    ends = {"least": float(share_rn[0].min()), "most": float(share_rn[0].max())}
    return {"directions": n, "not_finite": len(pairs) - n, **median, **ends}


def signs(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """For every sign: the number of directions that cross its limit, the rho, and how often before the KL of the predictions."""
    found = {}
    for sign in SIGNS:
        rho_n = [(result["crossings"].get(sign.name), result["crossings"].get(KL)) for result in results]
        crossed = [rho for rho, _ in rho_n if rho is not None]
        found[sign.name] = {
            "crossed": len(crossed),
            "of": len(results),
            "median_rho": float(np.median(crossed)) if crossed else None,
            "ahead_of_kl": sum(rho is not None and (kl is None or rho < kl) for rho, kl in rho_n),
        }
    return found


def held(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """The number of directions for which each prediction of the null model holds, of those that decide it."""
    found: dict[str, dict[str, int]] = {}
    for one in (prediction for result in results for prediction in predictions(result)):
        counts = found.setdefault(one.prediction, {"held": 0, "failed": 0, "not_decided": 0})
        counts["not_decided" if one.held is None else "held" if one.held else "failed"] += 1
    return found


def late_layers(early: Sequence[Result], late: Sequence[Result]) -> dict[str, Any]:
    """Median wall at the last site over that at the first, of the kinds that are at both, each side's directions drawn apart.

    "Late layers break at smaller rho" holds where the whole interval is below 1 and fails where it is above.
    """
    kinds = {result["kind"] for result in early} & {result["kind"] for result in late}
    ratio = ratio_of_walls(*([result for result in side if result["kind"] in kinds] for side in (late, early)))
    held = None if ratio is None else True if ratio["high"] < 1 else False if ratio["low"] > 1 else None
    return {"first": early[0]["site"], "last": late[0]["site"], "ratio": ratio, "held": held}


def ratio_of_walls(some: Sequence[Result], others: Sequence[Result]) -> Estimate | None:
    """Median wall of some directions over that of others, each drawn apart; None where none of either reaches it."""
    some_n, others_n = (np.array([_wall(result) for result in side]) for side in (some, others))
    some_n, others_n = some_n[np.isfinite(some_n)], others_n[np.isfinite(others_n)]
    if not (len(some_n) and len(others_n)):
        return None
    rng = np.random.default_rng(0)

    def median(value_n: np.ndarray) -> float:
        return float(np.median(value_n[rng.integers(0, len(value_n), len(value_n))]))

    return estimate(np.array([np.median(some_n) / np.median(others_n), *(median(some_n) / median(others_n) for _ in range(2000))]))


def rank_correlation(x_n: Sequence[float], y_n: Sequence[float]) -> dict[str, Any]:
    """Spearman's, with the interval over directions; None where fewer than four have both, or one side is constant."""
    from scipy.stats import rankdata

    pair_n2 = np.array([pair for pair in zip(x_n, y_n) if np.isfinite(pair).all()]).reshape(-1, 2)

    def spearman(drawn_n2: np.ndarray) -> float:
        rank_n2 = rankdata(drawn_n2, axis=0) - (len(drawn_n2) + 1) / 2
        length = math.sqrt(float((rank_n2**2).sum(0).prod()))
        return float(rank_n2.prod(1).sum()) / length if length else math.nan

    if len(pair_n2) < 4 or not math.isfinite(spearman(pair_n2)):
        return {"directions": len(pair_n2), "value": None, "low": None, "high": None}
    return {"directions": len(pair_n2), **_over_directions(pair_n2, spearman)}


def markdown(study: dict[str, Any]) -> str:
    """The tables, as a terminal and a page can show them."""
    parts = [f"# What a too large coefficient does to {study['model']}", ""]
    for site, found in study["summary"]["sites"].items():
        parts += [f"## {site}: {found['directions']} directions", ""]
        parts += _table(
            ("direction", "reach the wall", "rho at the wall, median (95 %)", "from", "to"),
            (
                (kind, f"{wall['reached']} of {wall['of']}", _estimate(wall["median"]), _figure(wall["least"]), _figure(wall["most"]))
                for kind, wall in found["walls"].items()
            ),
        )
        parts += _table(
            ("arm, at the wall of added", "damage restored, median (95 %)", "from", "to"),
            (
                (arm, _estimate(r) + f", {r['not_finite']} not finite" * (r["not_finite"] > 0), _figure(r["least"]), _figure(r["most"]))
                for arm, r in found["restored"].items()
            ),
        )
        ordered = sorted(found["signs"].items(), key=lambda item: math.inf if item[1]["median_rho"] is None else item[1]["median_rho"])
        parts += _table(
            ("sign", "rho, median", "directions that cross", "ahead of the KL"),
            ((name, _figure(s["median_rho"]), f"{s['crossed']} of {s['of']}", f"{s['ahead_of_kl']}") for name, s in ordered),
        )
        parts += _table(
            ("prediction of the null model", "held", "failed"),
            ((name, str(n["held"]), str(n["failed"])) for name, n in found["predictions"].items() if n["held"] + n["failed"]),
        )
        parts += [f"Median rho at the wall of random directions over that of the others: {_estimate(found['random_over_others'])}.", ""]
        parts += [f"Sharpness of the logit lens of v against rho at the wall: Spearman {_estimate(found['lens'])}.", ""]
    if (late := study["summary"]["late_layers"]) is not None:
        verdict = "not decided" if late["held"] is None else "held" if late["held"] else "failed"
        parts += [
            f"Late layers break at smaller rho than early ones: {verdict}; median wall at {late['last']} over that at {late['first']}: "
            f"{_estimate(late['ratio'])}.",
            "",
        ]
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)] + [""]


def _estimate(value: dict[str, Any] | None) -> str:
    if not value or value["value"] is None:
        return "-"
    return f"{_figure(value['value'])} ({_figure(value['low'])} to {_figure(value['high'])})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) >= 100 else f"{value:.2f}"
