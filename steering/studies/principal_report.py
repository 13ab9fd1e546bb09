"""What the measured directions say together: intervals, which components beat random ones and how many would by chance, the tables.

s prompts · r rounds of the bootstrap, the first of them the data as they are · k directions
"""

from typing import Any, NamedTuple

import numpy as np

from sae.statistics import Estimate, data_and_resamples, estimate, percentile_interval
from steering.studies.measured import (
    COMPONENT,
    IN_SPAN,
    IN_SPAN_WEIGHTED,
    Direction,
    DirectionResult,
    OneSign,
    consistency,
)


class AgainstRandom(NamedTuple):
    """One direction against a random group."""

    difference_r: np.ndarray
    p: float
    """one-sided, that the difference is not above 0"""
    percentile: float
    """share of the random group below it"""

    @property
    def passes(self) -> bool:
        return percentile_interval(self.difference_r[1:])[0] > 0


def beats(consistency_kr: np.ndarray, others_kr: np.ndarray, weight_rk: np.ndarray) -> list[AgainstRandom]:
    """Each direction's consistency minus the mean of a random group, prompts and the group's members drawn again together."""
    mean_r = _mean(others_kr, weight_rk)
    return [_beats(own_r, own_r - mean_r, others_kr) for own_r in consistency_kr]


def chance(others_kr: np.ndarray, weight_rk: np.ndarray) -> float:
    """Share of a random group that passes against its other members by the same rule: what passes by chance."""
    passed = 0
    for i, own_r in enumerate(others_kr):
        rest_rk = weight_rk.copy()
        rest_rk[:, i] = 0
        passed += _beats(own_r, own_r - _mean(others_kr, rest_rk), others_kr).passes
    return passed / len(others_kr)


def _beats(own_r: np.ndarray, difference_r: np.ndarray, others_kr: np.ndarray) -> AgainstRandom:
    p = (1 + (~(difference_r[1:] > 0)).sum()) / len(difference_r)  # a round without two different prompts shows nothing
    return AgainstRandom(difference_r, float(p), float((others_kr[:, 0] < own_r[0]).mean()))


def holm(p_k: list[float], level: float = 0.025) -> list[bool]:
    """Which of several tests hold together (Holm 1979): the i-th smallest p, from 0, must be at most level / (k − i), as all before it."""
    held = [False] * len(p_k)
    for i, k in enumerate(sorted(range(len(p_k)), key=p_k.__getitem__)):
        if p_k[k] > level / (len(p_k) - i):
            break
        held[k] = True
    return held


def report(
    tokenizer: Any, directions: list[Direction], measured: list[DirectionResult], recovered: list[tuple[str, float]] | None, seed: int
) -> dict[str, Any]:
    """Every number as plain values: `groups`, `components_against`, `verdict`, `directions`.

    `recovered` has each direction's label and its AUROC, None where the text has no labels.
    """
    rng = np.random.default_rng(seed)
    weight_rs = data_and_resamples(len(measured[0].linearity_s), rng)
    consistency_kr = np.stack([consistency(m.cosine_ss, weight_rs) for m in measured])
    linearity_kr = np.stack([weight_rs @ m.linearity_s / weight_rs.sum(1) for m in measured])
    rows = []
    for i, (direction, m) in enumerate(zip(directions, measured)):
        rows.append(
            {
                "group": direction.group,
                "name": direction.name,
                "consistency": estimate(consistency_kr[i]),
                "effective_tokens": m.effective_tokens,
                "linearity": estimate(linearity_kr[i]),
                "label": None if recovered is None else {"label": recovered[i][0], "auroc": recovered[i][1]},
                "sensitivity": m.sensitivity,
                "plus": _side(tokenizer, m.plus, weight_rs),
                "minus": _side(tokenizer, m.minus, weight_rs),
            }
        )
    members = {name: [i for i, d in enumerate(directions) if d.group == name] for name in dict.fromkeys(d.group for d in directions)}
    weight_of = {name: data_and_resamples(len(indices), rng) for name, indices in members.items()}
    random_r = _mean(consistency_kr[members[IN_SPAN]], weight_of[IN_SPAN])
    groups = []
    for name, indices in members.items():
        own = [measured[i] for i in indices]
        aurocs = None if recovered is None else [recovered[i][1] for i in indices]
        curves = {"consistency": consistency_kr[indices], "linearity": linearity_kr[indices]}
        groups.append(_group(name, own, aurocs, curves, weight_of[name], None if name == IN_SPAN else random_r))
    against = {
        name: _against(rows, consistency_kr, members[COMPONENT], members[name], weight_of[name]) for name in (IN_SPAN, IN_SPAN_WEIGHTED)
    }
    return {"groups": groups, "components_against": against, "verdict": principal_verdict(groups, against), "directions": rows}


def _mean(values_kr: np.ndarray, weight_rk: np.ndarray) -> np.ndarray:
    """Mean over directions in every round, NaN where none counts; values that do not hang on the prompts are [k, 1]."""
    with np.errstate(invalid="ignore"):
        return (weight_rk * values_kr.T).sum(1) / weight_rk.sum(1)


def _group(
    name: str,
    measured: list[DirectionResult],
    aurocs: list[float] | None,
    curves: dict[str, np.ndarray],
    weight_rk: np.ndarray,
    random_r: np.ndarray | None,
) -> dict[str, Any]:
    """Means over a group with intervals: of `curves` over prompts and directions, of the others over directions alone."""
    plain = {
        "effective_tokens": [m.effective_tokens for m in measured],
        "sensitivity": [m.sensitivity for m in measured],
        "label_auroc": aurocs,
    }
    means = {key: None if values is None else estimate(_mean(np.array(values)[:, None], weight_rk)) for key, values in plain.items()}
    means |= {key: estimate(_mean(values_kr, weight_rk)) for key, values_kr in curves.items()}
    above = None if random_r is None else estimate(_mean(curves["consistency"], weight_rk) - random_r)
    unreached = sum(not side.reached for m in measured for side in (m.plus, m.minus))
    known = {"group": name, "directions": len(measured), "sides_off_budget": unreached}
    return known | means | {"consistency_above_random_in_span": above}


def _side(tokenizer: Any, side: OneSign, weight_rs: np.ndarray) -> dict[str, Any]:
    known = {k: v for k, v in side._asdict().items() if k not in ("cosine_ss", "top_tokens")}
    tokens = side.top_tokens if tokenizer is None else [tokenizer.decode([i]) for i in side.top_tokens]
    return known | {"consistency": estimate(consistency(side.cosine_ss, weight_rs)), "top_tokens": tokens}


def _against(
    rows: list[dict[str, Any]], consistency_kr: np.ndarray, components: list[int], random: list[int], weight_rk: np.ndarray
) -> dict[str, Any]:
    found = beats(consistency_kr[components], consistency_kr[random], weight_rk)
    share = chance(consistency_kr[random], weight_rk)
    held = holm([b.p for b in found])
    listed = [
        {
            "name": rows[i]["name"],
            "difference": estimate(b.difference_r),
            "passes": b.passes,
            "p": b.p,
            "passes_holm": h,
            "percentile": b.percentile,
        }
        for i, b, h in zip(components, found, held)
    ]
    return {
        "components": listed,
        "pass": sum(b.passes for b in found),
        "pass_holm": sum(held),
        "by_chance_nominal": 0.025 * len(found),
        "random_that_pass": share,
        "by_chance_measured": share * len(found),
        "above_95_percent_of_random": sum(b.percentile >= 0.95 for b in found),
    }


def principal_verdict(groups: list[dict[str, Any]], against: dict[str, Any]) -> list[str]:
    """The answer in sentences, each by a rule."""
    sentences = []
    for name, found in against.items():
        n = len(found["components"])
        sentences.append(
            f"{found['pass']} of {n} components beat the mean of the directions {name!r} on consistency (95 % interval of the paired "
            f"difference above 0), {found['pass_holm']} of them together (Holm). By that rule {found['random_that_pass']:.0%} of those "
            f"random directions beat the others, so {found['by_chance_measured']:.1f} of {n} would pass by chance. "
            f"{found['above_95_percent_of_random']} stand above 95 % of the random directions ({0.05 * n:.1f} expected)."
        )
    of = {group["group"]: group["consistency_above_random_in_span"] for group in groups}[COMPONENT]
    word = "are more consistent than" if of["low"] > 0 else "are less consistent than" if of["high"] < 0 else "do not differ from"
    sentences.append(
        f"As a group the components {word} uniform random directions of their span: {of['value']:+.3f} "
        f"({of['low']:+.3f} to {of['high']:+.3f})."
    )
    return sentences


def print_principal(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def cell(value: Estimate | None, form: str = ".3f") -> str:
        return "" if value is None else f"{value['value']:{form}} ({value['low']:{form}} to {value['high']:{form}})"

    settings = result["settings"]
    title = f"{settings['model']}, {settings['site']}, {settings['kl']:g} nats per token; means with 95 % intervals"
    table = Table("group", "n", "consistency", "effective tokens", "linearity", "label AUROC", "KL / rho²", title=title)
    for g in result["groups"]:
        numbers = (cell(g["effective_tokens"], ".1f"), cell(g["linearity"]), cell(g["label_auroc"], ".2f"), cell(g["sensitivity"], ".2f"))
        table.add_row(g["group"], str(g["directions"]), cell(g["consistency"]), *numbers)
    console.print(table)
    table = Table("component", "consistency", "above random in span", "beats", "Holm", "label", "raised by +c", "raised by −c")
    for row, found in zip(result["directions"], result["components_against"][IN_SPAN]["components"]):
        label = "" if row["label"] is None else f"{row['label']['label']} {row['label']['auroc']:.2f}"
        raised = [" ".join(repr(t) for t in row[side]["top_tokens"][:6]) for side in ("plus", "minus")]
        passed = [("yes" if found[key] else "") for key in ("passes", "passes_holm")]
        table.add_row(row["name"], cell(row["consistency"]), cell(found["difference"], "+.3f"), *passed, label, *raised)
    console.print(table)
    for sentence in [*result["left_out"], *result["verdict"]]:
        console.print(f"- {sentence}", markup=False, highlight=False)
