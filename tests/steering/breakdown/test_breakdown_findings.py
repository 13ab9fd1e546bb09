"""Findings by rule, on results made by hand."""

import math

import pytest

from steering.breakdown.findings import SIGNS, crossing, crossings, predictions

RHOS = (0.25, 0.5, 1.0, 2.0, 4.0)


def layer(number, cos_v, taken_back, share):
    write = {"share": 0.3, "steered_share": 0.2, "taken_back": taken_back}
    return {
        "layer": number,
        "stream": {"steered": {"norm_ratio": 1.0, "cos_v": cos_v}},
        "beyond_p99": 0.0,
        "attn_in": [{"token_share": 0.8, "effective_rank": 40.0}, {"token_share": 0.8 * share, "effective_rank": 40.0}],
        "attn_out": write,
        "mlp_out": write | {"taken_back": 0.0},
        "attention_kl_h": [0.1, 0.3],
    }


def result(taken_back=0.05, cosine=0.95, front=(0.5, 0.52), rotated=0.1, wall=1.5, random=1.4):
    """KL is rho², so that it is 1 at rho 1; the token share is 1/(1 + rho²) of the unsteered one; distinct-2 falls to 0.4 at rho 2."""
    rows = []
    for rho in RHOS:
        distinct = 0.8 if rho < 1.5 else 0.32
        rows.append(
            {
                "arm": "added",
                "rho": rho,
                "logits": {"kl": rho**2, "lens_overlap": 0.0},
                "text": {"distinct_2": distinct, "nats_per_token": 3.0},
                "inside": {
                    "layers": [layer(1, cosine, taken_back, 1 / (1 + rho**2)), layer(2, cosine, taken_back, 1.0)],
                    "norm_gain": {"ln": None, "final": 1.0},
                },
            }
        )
        rows.append({"arm": "front", "rho": rho, "logits": {"kl": front[rho == RHOS[-1]]}})
    reached = {"reached": True, "kl": 1.0}
    return {
        "rows": rows,
        "first_norm": "attn_in.1",
        "unsteered_text": {"distinct_2": 0.8, "nats_per_token": 3.0},
        "slopes": {"front": [2.0, math.log(front[1] / front[0]) / math.log(RHOS[-1] / RHOS[-2])]},
        "walls": {"added": {"rho": wall} | reached, "random": {"rho": random} | reached},
        "restored": {"rotated": {"value": rotated, "low": rotated - 0.1, "high": rotated + 0.1}},
    }


@pytest.mark.parametrize("limit", [0.3, 1.0, 1.7])
def test_a_crossing_is_exact_where_values_are_linear_in_log_rho(limit):
    points = [(rho, 2 * math.log(rho) + 1.5) for rho in RHOS]
    assert crossing(points, limit) == pytest.approx(math.exp((limit - 1.5) / 2))
    falling = [(rho, -value) for rho, value in points]
    assert crossing(falling, -limit, above=False) == pytest.approx(math.exp((limit - 1.5) / 2))


def test_a_crossing_at_the_edges_and_with_gaps():
    assert crossing([(1, 5.0), (2, 6.0)], 3.0) == 1
    assert crossing([(1, 0.0), (2, 1.0)], 3.0) is None
    assert crossing([(1, 0.0), (2, math.inf)], 3.0) == 2
    assert crossing([(1, 0.0), (2, None), (4, 4.0)], 2.0) == pytest.approx(2)
    assert crossing([(1, math.nan), (2, 4.0)], 2.0) == 2
    assert crossing([], 2.0) is None


def test_what_crosses_first_comes_first():
    found = crossings(result())
    assert set(found) == {sign.name for sign in SIGNS}
    assert found["KL of the predictions, nats"] == pytest.approx(1)
    assert found["token share behind the first norm, over the unsteered one"] == pytest.approx(1)
    assert found["cosine of the stream and v, at any layer"] == 0.25
    share = (0.5 - 1) / (0.4 - 1)
    assert found["distinct-2 of the text over the unsteered one"] == pytest.approx(2**share)
    known = [rho for rho in found.values() if rho is not None]
    assert known == sorted(known)
    assert list(found.values())[len(known) :] == [None] * (len(found) - len(known))
    assert found["norm of the stream over the unsteered one, at any layer"] is None


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, [True, True, None, True, True, True]),
        ({"wall": 0.7}, [False, True, None, True, False, True]),
        ({"front": (0.5, 0.9)}, [True, False, None, True, True, True]),
        ({"rotated": 0.6}, [True, True, None, False, True, True]),
        ({"random": 3.0}, [True, True, None, True, False, True]),
        ({"taken_back": 0.4}, [True, True, None, True, True, False]),
        ({"cosine": 0.6}, [True, True, None, True, True, False]),
    ],
)
def test_predictions_are_held_or_failed_by_their_rules(changes, held):
    assert [one.held for one in predictions(result(**changes))] == held


def test_what_was_not_measured_decides_nothing():
    bare = result()
    bare["rows"] = [{"arm": "added", "rho": 1.0, "failure": "overflow"}]
    bare["restored"], bare["first_norm"] = {}, None
    bare["walls"] = {"added": {"rho": 9.0, "reached": False, "kl": 0.1}}
    bare["slopes"] = {}
    assert [one.held for one in predictions(bare)] == [None] * 6
    assert set(crossings(bare).values()) == {None}
