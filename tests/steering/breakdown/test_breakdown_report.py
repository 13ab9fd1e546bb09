"""The page of a sweep, parsed as a browser would, and held against the numbers it was given."""

import copy
import itertools
import re
from html.parser import HTMLParser

import pytest
from test_breakdown_findings import RHOS, result

from sae.html import figure
from steering.breakdown.findings import crossings, predictions
from steering.breakdown.report import report_html

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'></style>"
VOID = {"meta", "line", "path", "rect", "circle", "br"}


def whole(**changes) -> dict:
    found = copy.deepcopy(result(**changes))
    for row in found["rows"]:
        if row["arm"] == "added":
            row["text"] |= {"texts": [f" text at {row['rho']:g}", "another"]}
    found["unsteered_text"] |= {"texts": [" plain text"]}
    found |= {"model": "m", "site": "resid_post.0", "vector": {"method": "random", "seed": 1}, "wall": 1.0, "left_out": {}, "rho_of_1": 0.2}
    found["where"] = "everywhere"
    found |= {"settings": {"command": "sae diagnose-breakdown", "prompts": ["I think"]}}
    found["null"] = [{"rho": rho, "cos_v": 0.123, "token_share": 0.456, "effective_rank": 78.9} for rho in RHOS]
    return found | {"crossings": crossings(found), "predictions": [one._asdict() for one in predictions(found)]}


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def test_every_tag_is_closed_and_nothing_is_fetched_or_run():
    page = Page(report_html(whole()))
    assert not page.open
    assert not {"script", "img", "link", "iframe", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]


def test_markup_in_any_text_is_inert():
    found = whole()
    found["model"] = found["settings"]["command"] = found["vector"]["method"] = EVIL
    found["settings"]["prompts"] = found["unsteered_text"]["texts"] = [EVIL]
    found["left_out"] = {EVIL: EVIL}
    page = Page(report_html(found))
    assert not {"script", "img"} & set(page.tags)
    assert "".join(page.text).count("alert(1)") >= 6


def test_findings_walls_null_and_texts_are_there():
    found = whole(wall=0.7, random=0.7, rotated=0.6)
    html = report_html(found)
    text = " ".join("".join(Page(html).text).split())
    for name, rho in found["crossings"].items():
        assert name in text
        assert rho is None or figure(rho) in text
    assert html.count('<tr class="held">') == 3
    assert html.count('<tr class="failed">') == 2
    assert html.count("not decided") == 1
    assert "plain text" in text
    assert all(f"text at {rho:g}" in text for rho in RHOS)
    assert text.count("0.123") == len(RHOS)


def test_texts_at_the_walls_are_there_where_they_were_written():
    found = whole()
    assert "What each arm writes" not in report_html(found)
    for name, wall in found["walls"].items():
        wall["text"] = {"prompt": "It was", "texts": [f" said by {name}"], "nats_per_token": 7.25, "distinct_2": 0.5}
    found["walls"]["random"] |= {"reached": False, "text": {"prompt": "It was", "failure": "not finite"}}
    text = "".join(Page(report_html(found)).text).split("What each arm writes at equal KL")[1]
    assert "Continuations of “It was”" in text
    assert "added, rho 1.50 said by added7.250.500" in text
    assert "random, rho 1.40 (not reached)not finite" in text


def test_a_map_has_a_cell_for_every_layer_and_strength():
    html = report_html(whole())
    table = html.partition("cosine of the stream and v</h3>")[2].partition("</table>")[0]
    assert re.findall(r"<tr><th>(\d)</th>", table) == ["1", "2"]
    assert re.findall(r"<td style='--a:([\d.]+)'>0.950</td>", table) == ["0.75"] * 2 * len(RHOS)
    behind = html.partition("token share after attention&#x27;s norm, steered over unsteered</h3>")[2].partition("</table>")[0]
    assert [float(one) for one in re.findall(r"'>([\d.]+)</td>", behind)][: len(RHOS)] == pytest.approx(
        [1 / (1 + rho**2) for rho in RHOS], rel=1e-2
    )


def test_a_line_of_the_plot_rises_by_the_decades_of_its_kl():
    """KL is rho²: on two log scales a straight line of slope 2, in units of each axis."""
    html = report_html(whole())
    points = [tuple(map(float, one.split())) for one in re.search(r'class="series s0"[^>]*><path d="M([^"]+)"', html)[1].split("L")]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=1e-2)
    assert slopes[0] < 0  # upwards


def test_a_sweep_without_anything_finite_still_has_a_page():
    found = whole()
    found["rows"] = [{"arm": "added", "rho": 1.0, "coefficient": 5.0, "failure": "overflow", "text": {"failure": "not finite"}}]
    found["walls"] = {"added": {"rho": 9.0, "kl": None, "reached": False}}
    found["restored"] = {}
    text = "".join(Page(report_html(found)).text)
    assert "nothing to draw" in text
    assert "not finite" in text
