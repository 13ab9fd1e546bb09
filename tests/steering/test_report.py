"""The page is looked at as a browser would: parsed, and its text held against the numbers it was given."""

import copy
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.html import figure, ticks
from steering.compare.report import report_html

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'></style></title>"
METHODS = (
    ("no steering", "baseline"),
    ("plain prompting", "baseline"),
    ("random direction", "control"),
    ("shuffled labels", "control"),
    ("SAE feature by AUROC", "method"),
    ("SAE feature by output score", "method"),
    ("ActAdd", "method"),
    ("DiffMean", "method"),
    ("PCA of differences", "method"),
    ("principal direction", "method"),
    ("ITI", "method"),
)
STRONG = {"SAE feature by output score": 30.0, "DiffMean": 22.0, "SAE feature by AUROC": 9.0, "ActAdd": 3.0, "plain prompting": 18.0}
PROMPTS = ("I think", "The man said", "When we got there,", "It was")
SAID = (
    " that the damn thing was never going to work, and he knew it.\nShe said nothing, only looked at the sea.",
    " he had been there before the war, with a fucking horse and two hundred pounds of flour.",
    " it is a good place to sit and wait for the boat, if it comes at all.",
    " not what I had expected.",
)


def spread(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def range_of(method: str) -> dict:
    crossed = {"coefficient": 2.46, "sign": "KL", "beyond": "the predictions are broken", "unusual": 0.98}
    if method == "ActAdd":
        crossed = dict.fromkeys(crossed)
    return crossed | {"tried": 109.3, "rho_of_1": 0.073}


def invented() -> dict:
    """A result in the form of comparison.json; nothing in it was measured."""
    rng = np.random.default_rng(0)
    arms, broken = [], []
    for method, kind in METHODS:
        levels = []
        for budget in (0.1, 0.3, 1.0) if kind != "baseline" else (None,):
            size = budget or 0.35
            gain = 0.0 if method == "no steering" else STRONG.get(method, 0.4) * math.sqrt(size) + rng.normal(0, 0.4)
            texts = [
                {"prompt": p, "half": h, "text": SAID[(i + len(method)) % 4], "target": 50.0}
                for i, (p, h) in enumerate(zip(PROMPTS, ("choose", "score") * 2))
            ]
            levels.append(
                {
                    "budget": budget,
                    "coefficient": 12.3 * size if budget else 0.0,
                    "kl": size if budget else 0.0,
                    "rho": 0.9 * size,
                    "max_activations": None if method == "ITI" else 2 * size,
                    "reached": not (method == "ActAdd" and budget == 1.0),
                    "monotone": True,
                    "failure": None,
                    "beyond_working_range": None if kind == "baseline" or method == "ITI" else method != "ActAdd" and size > 0.2,
                    "choose": {"target": 3 + gain, "gain": gain - 0.2},
                    "score": {
                        "target": spread(3 + gain, 2),
                        "gain": spread(gain, 0.0 if method == "no steering" else 2 + size),
                        "second_target": spread(0.4, 0.03),
                    },
                    "nats_per_token": spread(3.9 + size, 0.1),
                    "distinct_2": 0.93 - 0.1 * size,
                    "longest_repeat": 1.4 + size,
                    "off_topic_kl": 0.0 if method == "no steering" else size * rng.uniform(0.9, 1.25),
                    "top1_flips": 0.2 * size,
                    "texts": texts,
                }
            )
        if method == "PCA of differences":
            levels[2] |= dict.fromkeys(("choose", "score", "nats_per_token", "distinct_2", "longest_repeat"))
            levels[2] |= {"failure": "no text: the logits are not finite", "texts": []}
        able = [level for level in levels if level["score"]]
        best = max(able, key=lambda level: level["choose"]["gain"])
        arms.append(
            {
                "method": method,
                "kind": kind,
                "note": "feature 411: AUROC 0.93 on the texts to fit" if "feature" in method else None,
                "left_out": None,
                "detection_auroc": spread(0.8, 0.07) if kind != "baseline" else None,
                "levels": levels,
                "best": {"budget": best["budget"], "gain": best["score"]["gain"]},
                "working_range": None if kind == "baseline" or method == "ITI" else range_of(method),
                "no_working_range": "expected a steering vector at one site" if method == "ITI" else None,
            }
        )
        if kind != "baseline":
            texts = [{"prompt": prompt, "text": " the the the fuck fuck the fuck" * 3} for prompt in PROMPTS[:3]]
            broken.append(
                {
                    "method": method,
                    "budget": 5.0,
                    "coefficient": 80.0,
                    "kl": 5.1,
                    "rho": 6.0,
                    "reached": True,
                    "failure": None,
                    "texts": texts,
                }
            )
    left_out = {"method": "SAE-TS", "kind": "method", "note": None, "left_out": "no effect map was given"}
    arms.append(left_out | dict.fromkeys(("detection_auroc", "best", "working_range", "no_working_range")) | {"levels": []})
    methods = [method for method, kind in METHODS if kind != "baseline" and method not in ("ActAdd", "ITI")]
    unit = rng.normal(size=(len(methods), 8)) + 0.6
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    words = ["damn", "fuck", "fucking"]
    return {
        "format": "comparison-1",
        "concept": {"name": "curse_words", "description": "Swearing.", "positive": ["Oh damn."], "negative": ["Oh dear."], "words": words,
                    "prompt_pairs": [["Damn", "Well"]], "prompt": "Damn it!", "label": None},
        "model": "checkpoints/demo-lm",
        "site": "resid_post.2",
        "dictionary": "checkpoints/demo-sae",
        "seed": 0,
        "settings": {"budgets": [0.1, 0.3, 1.0], "samples": 4, "texts": {"fit_positive": 22},
                     "command": "compare --concept curse_words"},
        "target": {"kind": "words", "describe": "words per 1,000 that are among the 3 listed for curse_words", "held_out_auroc": 1.0},
        "second_target": {"kind": "classifier", "describe": "probability by a classifier", "held_out_auroc": 0.83},
        "arms": arms,
        "broken": broken,
        "cosines": {"methods": methods, "matrix": (unit @ unit.T).tolist()},
        "verdict": [
            "DiffMean steers towards curse_words: +22.1 (+19.1 to +25.1) at 1 nat, more than random direction and shuffled labels.",
            "ITI: no evidence that it steers towards curse_words, +0.4 (-1.6 to +2.4); the interval includes 0.",
            "Plain prompting, for comparison: +10.6 (+8 to +13), with an off-topic KL of 0.35 nat.",
        ],
    }  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, and the text outside the style sheet."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_every_tag_is_closed_and_nothing_is_fetched_or_run():
    html = report_html(invented())
    page = Page(html)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "a", "form"}
    assert not any(key.startswith("on") or key in ("src", "href") for _, attrs in page.tags for key in attrs)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert "url(" not in html
    assert "@import" not in html
    assert html == report_html(invented())


def poisoned(value):
    """Every text and every free key of it holds markup; kinds and halves are words of the form and stay."""
    if isinstance(value, dict):
        return {key: entry if key in ("kind", "half", "format") else poisoned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [poisoned(entry) for entry in value]
    return f"{EVIL}{value}" if isinstance(value, str) else value


def test_markup_in_any_text_is_inert():
    result = poisoned(invented())
    result["settings"][EVIL] = EVIL
    html = report_html(result)
    page, plain = Page(html), Page(report_html(invented()))
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert not any(key.startswith("on") or key == "src" for _, attrs in page.tags for key in attrs)
    assert "<script" not in html
    assert "alert(1)" in page.text


def test_numbers_texts_reasons_and_verdict_are_there():
    result = invented()
    page = Page(report_html(result))
    for sentence in result["verdict"]:
        assert sentence in page.text
    assert "SAE-TS: no effect map was given" in page.text
    assert "no text: the logits are not finite" in page.text
    assert "compare --concept curse_words" in page.text
    best = next(arm for arm in result["arms"] if arm["method"] == "DiffMean")["best"]
    assert figure(best["gain"]["value"], signed=True) in page.text
    assert "the the the fuck" in page.text  # the broken strength
    assert "the logits are not finite" in page.text
    assert "not reached" in page.text
    assert sum(tag == "mark" for tag, _ in page.tags) > 10
    assert page.text.count("without a direction") == 2  # no steering and prompting


def test_plot_has_a_point_for_every_level_with_text_and_one_line_for_each_interval():
    result = invented()
    page = Page(report_html(result))
    plot = [attrs for tag, attrs in page.tags if tag == "title"]
    drawn = sum(len([lv for lv in arm["levels"] if lv["score"] and lv["off_topic_kl"] > 0]) for arm in result["arms"])
    assert len(plot) == drawn + 1  # and the page's own title
    hollow = [attrs for _, attrs in page.tags if attrs.get("class") == "dot open"]
    assert len(hollow) == 1  # ActAdd at 1 nat


def test_strengths_beyond_the_working_range_are_marked_everywhere():
    result = invented()
    html = report_html(result)
    page = Page(html)
    beyond = [(arm, level) for arm in result["arms"] for level in arm["levels"] if level["beyond_working_range"]]
    drawn = [level for _, level in beyond if level["score"]]
    assert sum(attrs.get("class") == "ring" for _, attrs in page.tags) == len(drawn) > 5
    assert html.count(", beyond its working range</title>") == len(drawn)
    best = [level for arm, level in beyond if arm["best"]["budget"] == level["budget"]]
    assert html.count('<small class="beyond">') == len(beyond) + len(best)
    ranges = page.text.split("How far each direction works")[1].split("Left out")[0]
    assert ranges.count("the predictions are broken") == 7
    assert "ActAddover 109no sign of breaking up to there–none" in ranges
    assert "DiffMean2.46ρ 0.180the predictions are broken0.9800.3, 1" in ranges
    assert "Without a working range: ITI, expected a steering vector at one site" in ranges


def test_table_is_sorted_by_gain():
    text = Page(report_html(invented())).text.split("Each method at its best budget")[1].split("How far")[0]
    assert (
        text.index("SAE feature by output score") < text.index("DiffMean") < text.index("SAE feature by AUROC") < text.index("no steering")
    )


def test_page_of_a_result_that_came_back_from_json_is_the_same():
    assert report_html(json.loads(json.dumps(invented()))) == report_html(invented())


def test_comparison_without_words_second_score_cosines_or_any_text():
    result = invented()
    result["concept"] = {"name": "mine", "words": [], "prompt": None}
    result["second_target"], result["dictionary"], result["broken"] = None, None, []
    result["cosines"] = {"methods": [], "matrix": []}
    result["target"] |= {"kind": "classifier", "held_out_auroc": None}
    page = Page(report_html(result))
    assert page.open == []
    assert "mark" not in {tag for tag, _ in page.tags}
    assert "How alike" not in page.text
    empty = copy.deepcopy(result) | {"arms": [arm for arm in result["arms"] if arm["left_out"]], "verdict": []}
    assert "nothing to draw" in Page(report_html(empty)).text


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [(0.0, False, "0.00"), (0.0, True, "0.00"), (1234.6, False, "1,235"), (-0.5, False, "−0.500"), (2, True, "+2.00"), (None, True, "–"),
     (float("nan"), False, "–"), (1e-5, False, "1.0e−05"), (99.96, False, "100")],
)  # fmt: skip
def test_number(value, signed, text):
    assert figure(value, signed) == text


@given(st.floats(-1e4, 1e4), st.floats(1e-6, 1e5))
def test_ticks_are_evenly_spaced_round_numbers_within_the_range(low, width):
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-6 * width <= t <= low + width * (1 + 1e-6) for t in found)
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    assert f"{steps[0]:.0e}"[0] in "125"
