"""The server's pages that need the model: a prompt's features, and steering."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import numpy as np

from sae.features.browser.prompt import MOST_PAIRS
from sae.features.browser.screens import alert, name_html, page
from sae.html import number, visible, word_html

if TYPE_CHECKING:
    from sae.features.browser.prompt import Reading, TokenFeature
    from sae.features.browser.state import Browser
    from sae.model.sampling import Sampling

ORDERS = {"activation": "activation", "percentile": "percentile of the feature's own activations", "effect": "effect on the loss"}
STRONGEST = 5  # either end of a steering slider, in maximum activations


def prompt(browser: "Browser", params: dict[str, str], reading: "Reading | None", failure: str = "") -> str:
    """The form, the text with its tokens to click, and the features of every token or of the chosen ones; or why there are none."""
    if browser.lm is None:
        failure = "The server was started without a model to read a text with."
    order, chosen = params.get("order") or "activation", [part for part in params.get("t", "").split(",") if part]
    density, text = params.get("density_max", ""), params.get("text", "")
    options = "".join(f'<option value="{name}"{" selected" if name == order else ""}>{title}</option>' for name, title in ORDERS.items())
    head = f"""<h1>Which features fire on a text</h1>
<form action="/prompt" class="prompt"><textarea name="text" rows="3" maxlength="2000" required aria-label="text">
{escape(text)}</textarea><p><label>rank by <select name="order">{options}</select></label>
<label>density at most <input name="density_max" value="{escape(density)}" size="6" placeholder="0.01"></label>
<button>Read</button></p></form>"""
    if reading is None:
        return page("Prompt", head + alert(failure))

    def token(p: int) -> str:
        others = [t for t in chosen if t != str(p)] + ([] if str(p) in chosen else [str(p)])
        kept = [(name, value) for name, value in (("text", text), ("order", order), ("density_max", density)) if value]
        address = "/prompt?" + urlencode([*kept, *(("t", t) for t in others)])
        loss = reading.losses[p]
        title = f"token {p}" + ("" if loss is None else f", loss {loss:.2f} nats")
        pressed = ' aria-current="true"' if str(p) in chosen else ""
        return f'<a class="token" title="{title}"{pressed} href="{escape(address)}">{visible(reading.texts[p]) or "·"}</a>'

    note = f"{reading.active:,} pairs of token and feature."
    if order == "effect":
        some = reading.measured == MOST_PAIRS
        note += (
            f" The effect was measured for {reading.measured:,} of them, "
            + ("those that add the longest vectors" if some else "all but the last token's, which no token follows")
            + ": nats by which the loss of all later tokens rises when the feature is taken away at its token alone; above 0 it helped."
        )
    body = _ranking(browser, reading, [int(p) for p in chosen], order) if chosen else _by_token(browser, reading, order)
    tokens = "".join(token(p) for p in range(len(reading.texts)))
    return page(
        "Prompt", f'{head}<p class="text tok">{tokens}</p><p class="soft">{note} Click tokens to rank features over them.</p>{body}'
    )


def _by_token(browser: "Browser", reading: "Reading", order: str) -> str:
    rows = []
    for p, firings in enumerate(reading.firings):
        chips = "".join(
            f'<a class="chip" href="/f/{f.feature}" title="{_values(f)}">{f.feature} <span>{name_html(browser, f.feature)}</span> '
            f"<b>{_ranked(f, order)}</b></a>"
            for f in firings
        )
        loss = "" if reading.losses[p] is None else f"{reading.losses[p]:.2f}"
        rows.append(
            f'<tr><td class="num">{p}</td><td class="tok"><code>{word_html(reading.texts[p])}</code></td>'
            f'<td class="num">{loss}</td><td class="chips">{chips}</td></tr>\n'
        )
    heads = f'<th class="num">token</th><th>text</th><th class="num">loss</th><th>features by {order}</th>'
    return f'<section class="scroll"><table class="tokens"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></section>'


def _ranking(browser: "Browser", reading: "Reading", chosen: Sequence[int], order: str) -> str:
    """The firings on the chosen tokens in one order."""
    firings = [firing for p in chosen if 0 <= p < len(reading.firings) for firing in reading.firings[p]]
    firings.sort(key=lambda f: -(f.effect if f.effect is not None else -np.inf) if order == "effect" else -getattr(f, order))

    def effect(firing: "TokenFeature") -> str:
        text = "–" if firing.effect is None else f"{firing.effect:+.3f}"
        return f'<td class="num">{text}</td>' if order == "effect" else ""

    rows = "".join(
        f'<tr><td class="num"><a class="open" href="/f/{f.feature}">{f.feature}</a></td><td>{name_html(browser, f.feature)}</td>'
        f'<td class="tok"><code>{word_html(reading.texts[f.position])}</code></td><td class="num">{number(f.activation)}</td>'
        f'<td class="num">{_percentile(f)}</td>{effect(f)}</tr>\n'
        for f in firings
    )
    numbers = ("activation", "percentile", *(("effect, nats",) if order == "effect" else ()))
    heads = '<th class="num">feature</th><th>name</th><th>token</th>' + "".join(f'<th class="num">{name}</th>' for name in numbers)
    return f'<section class="scroll"><table class="ranking"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></section>'


def _percentile(firing: "TokenFeature") -> str:
    return "" if np.isnan(firing.percentile) else f"{100 * firing.percentile:.1f}"


def _ranked(firing: "TokenFeature", order: str) -> str:
    if order == "effect":
        return "–" if firing.effect is None else f"{firing.effect:+.2f}"
    return _percentile(firing) if order == "percentile" else number(firing.activation)


def _values(firing: "TokenFeature") -> str:
    effect = "" if firing.effect is None else f", effect {firing.effect:+.3f} nats"
    return f"activation {number(firing.activation)}, percentile {_percentile(firing)}{effect}"


def steer(browser: "Browser", features: dict[int, float], sampling: "Sampling", text: str, failure: str = "") -> str:
    """The steering panel; the script fills its two sides as the server writes them."""
    if browser.steering is None:
        return page("Steer", "<h1>Steer</h1>" + alert("The server was started without a model to steer."))
    rows = "".join(_strength(browser, j, strength) for j, strength in features.items())
    titles = {"max_new_tokens": "new tokens", "temperature": "temperature", "top_p": "top-p", "seed": "seed"}
    numbers = "".join(
        f'<label>{title} <input name="{name}" value="{getattr(sampling, name):.12g}" size="6" inputmode="decimal"></label>'
        for name, title in titles.items()
    )
    sides = "".join(
        f'<section id="{side}"><h2>{side}</h2><p class="written" aria-live="polite"></p><p class="soft facts"></p></section>'
        for side in ("unsteered", "steered")
    )
    body = f"""<h1>Steer</h1>
{alert(failure)}<form action="/steer" id="steer"><textarea name="prompt" rows="2" maxlength="2000" aria-label="prompt" placeholder="prompt">
{escape(text)}</textarea>{rows}
<p class="numbers"><label>add feature <input name="add" size="7" inputmode="numeric"></label><button id="add">Add</button></p>
<p class="numbers">{numbers}<button type="button" id="run">Write</button><button type="button" id="stop" hidden>Stop</button></p></form>
<noscript><p class="refusal">Writing needs the script of this page.</p></noscript>
<p id="failure" role="alert" class="refusal" hidden></p><div class="both">{sides}</div>
<p class="soft">Strength 1 adds what the feature adds where it fires hardest, at every position. Both sides draw with the same random
numbers, so at strength 0 they are equal. Nats per token are those of the unsteered model: the more, the further the text has left what
it would say.</p>"""
    return page("Steer", body)


def _strength(browser: "Browser", j: int, strength: float) -> str:
    highest = number(browser.index.feature(j).maximum)
    return f"""<p class="strength"><input type="hidden" name="feature" value="{j}"><a href="/f/{j}">{j}</a>
<span class="soft">{name_html(browser, j)}</span>
<input type="range" min="-{STRONGEST}" max="{STRONGEST}" step="0.1" value="{strength:g}" aria-label="strength of {j}">
<input name="strength" type="number" step="any" value="{strength:g}" aria-label="strength of {j} as a number" required>
× its maximum of {highest} <button type="button" class="drop" title="remove">✕</button>
<span class="range soft"{"" if browser.ranges else " hidden"}></span></p>"""
