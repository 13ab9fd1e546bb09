"""A feature as one self-contained HTML page, and a table of the pages: no network, every piece of text escaped.

`feature_html` is the fragment that notebook, server and exported file share; `document` puts it into a page of its own.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from sae.features.assets import STYLE, TABLE_SCRIPT
from sae.features.records import Context, FeatureIndex
from sae.files import atomic
from sae.progress import progress

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LEVELS = 9  # shades of activation
DIRECTION_MARKS = {*range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C}  # would turn a row's order about
BREAKS = {"\n": '<i class="n">\n</i>', "\t": '<i class="t">\t</i>', "\r": '<i class="q">&#13;</i>'}


def write_pages(index: FeatureIndex, features: Sequence[int], folder: Path, heading: str = "Features") -> Path:
    """Writes a page per feature, each leading to the next of `features`, and index.html, whose path is returned.

    Raises `InputError` for a feature that does not exist, before anything is written.
    """
    for j in features:
        index.feature(j)
    folder.mkdir(parents=True, exist_ok=True)
    with progress("write pages", len(features), "pages") as bar:
        for i, j in enumerate(features):
            around = (features[i - 1] if i else None, features[i + 1] if i + 1 < len(features) else None)
            text = document(f"Feature {j} · {index.info['site']}", navigation(*around) + feature_html(index, j))
            with atomic(folder / f"{j}.html") as temporary:
                temporary.write_text(text, encoding="utf-8")
            bar.advance(1)
    with atomic(folder / "index.html") as temporary:
        temporary.write_text(document(heading, table_html(index, features, heading)), encoding="utf-8")
    return folder / "index.html"


def document(title: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body>{body}</body></html>\n"
    )


def navigation(previous: int | None, following: int | None) -> str:
    links = ['<a href="index.html">all features</a>']
    if previous is not None:
        links.append(f'<a rel="prev" href="{previous}.html">← {previous}</a>')
    if following is not None:
        links.append(f'<a rel="next" href="{following}.html">{following} →</a>')
    return f"<nav>{''.join(links)}</nav>\n"


def feature_html(index: FeatureIndex, j: int, n: int = 20, seed: int = 0) -> str:
    """Everything about one feature, as a fragment. Raises `InputError` if it does not exist."""
    feature, info = index.feature(j), index.info
    columns = feature.columns
    model = info["model"]["name"].rstrip("/").rsplit("/", 1)[-1]  # the folder or hub name, without the path of whoever made it
    count, scanned = int(columns["count"]), info["tokens_scanned"]
    facts = {
        "density": f"{_percent(count / scanned)}" + (f" (one token in {round(scanned / count):,})" if 0 < 2 * count <= scanned else ""),
        "fires on": f"{count:,} of {scanned:,} tokens scanned",
        "maximum": _number(columns["max"]),
        "mean when firing": _number(columns["mean"]),
        "decoder norm": _number(columns["decoder_norm"]),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts.items())
    share = [(token, f"{100 * part:.0f}%") for token, part in index.top_tokens(j, 10)]
    cards = [
        f"<section><h2>Statistics</h2><dl>{rows}</dl></section>",
        f"<section><h2>Activations</h2>{histogram_svg(*index.histogram(j))}</section>",
        f"<section><h2>Fires on</h2>{_token_list(index, share)}<p class='soft'>share of its activation by token</p></section>",
        _lens_section(index, j),
    ]
    top, sample = index.top_contexts(j, n), index.random_contexts(j, n, seed)
    return (
        f"<h1>Feature {j}</h1><p class='soft'>{escape(info['site'])} of {escape(model)}, {info['d_sae']:,} features</p>\n"
        f"<div class='top'>{''.join(cards)}</div>\n<div class='sides'>"
        + _contexts_section("Top activations", "The extremes; at most two from a document.", top, float(columns["max"]))
        + _contexts_section("Random activations", f"A fair sample of the {count:,}: what it usually does.", sample, float(columns["max"]))
        + "</div>\n<p class='soft'>Shade and hover give the activation; firing tokens are underlined, the row's own is bold. Faded tokens "
        "were not scanned. Click a row to unfold it.</p>"
    )


def _contexts_section(title: str, note: str, contexts: list[Context], top: float) -> str:
    rows = "\n".join(row_html(context, top) for context in contexts) or "<p>It never fires.</p>"
    return f"<section><h2>{title}</h2><p class='soft'>{note}</p>\n{rows}</section>\n"


def row_html(context: Context, top: float) -> str:
    """One line: activation, the document's label, left context, and the firing token with what follows; `top` gets the full shade."""
    left, right, text, value, scanned, own = "", "", "", 0.0, False, False
    for i, piece in enumerate(context.texts):
        text += piece
        value = max(value, float(context.values[i]))
        scanned |= bool(context.scanned[i])
        own |= i == context.centre
        if not piece and i + 1 < len(context.texts):  # part of a character that a later token completes: they are shown as one
            continue
        html = _token_html(text, value, scanned, own, top)
        if own or right:
            right += html
        else:
            left += html
        text, value, scanned, own = "", 0.0, False, False
    label = escape(context.label or "")
    return (
        f'<div class="row" tabindex="0"><span class="v">{_number(context.value)}</span><span class="g" title="{label}">{label}</span>'
        f'<span class="l"><span>{left}</span></span><span class="r">{right}</span></div>'
    )


def _token_html(text: str, value: float, scanned: bool, own: bool, top: float) -> str:
    if value <= 0 and not own:
        return visible(text) if scanned or not text else f"<u>{visible(text)}</u>"
    level = max(1, min(LEVELS, math.ceil(LEVELS * value / top))) if top > 0 else 1
    return f'<b class="a{level}{" c" if own else ""}" title="{_number(value)}">{visible(text)}</b>'


def visible(text: str) -> str:
    """Escaped text in which line breaks, tabs and characters that cannot be seen carry a mark; the element's text stays the same,
    except for control characters that HTML does not allow, which become their pictures."""
    if text.isprintable():  # nearly all tokens
        return escape(text)
    parts = []
    for letter in text:
        code = ord(letter)
        if letter in BREAKS:
            parts.append(BREAKS[letter])
        elif code < 0x20:
            parts.append(f'<i class="x">{chr(0x2400 + code)}</i>')
        elif 0x7F <= code < 0xA0 or code in DIRECTION_MARKS:
            parts.append(f'<i class="x">U+{code:04X}</i>')
        else:
            parts.append(letter if letter not in "<>&\"'" else escape(letter))
    return "".join(parts)


def histogram_svg(edges: np.ndarray, counts: np.ndarray) -> str:
    """Bars on two logarithmic axes, each with its range and count on hover."""
    if not len(counts):
        return "<p>It never fires.</p>"
    width, height, left, bottom = 340, 130, 34, 16
    bar = (width - left) / len(counts)
    tallest = math.log10(1 + counts.max())
    shapes = []
    for power in range(int(tallest) + 1):
        y = height - height * 0.94 * math.log10(1 + 10**power) / tallest
        if y > 4:
            shapes.append(
                f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/><text x="0" y="{y + 3:.1f}">{_short(10**power)}</text>'
            )
    for i, count in enumerate(counts.tolist()):
        h = height * 0.94 * math.log10(1 + count) / tallest
        shapes.append(
            f'<rect x="{left + i * bar:.1f}" y="{height - h:.1f}" width="{max(bar - 0.6, 0.6):.1f}" height="{h:.1f}">'
            f"<title>{_number(edges[i])} to {_number(edges[i + 1])}: {count:,}</title></rect>"
        )
    shown = sorted({0, len(counts) // 3, 2 * len(counts) // 3, len(counts)} if len(counts) >= 6 else {0, len(counts)})
    for i in shown:
        anchor = "start" if i == 0 else "end" if i == len(counts) else "middle"
        shapes.append(f'<text x="{left + i * bar:.1f}" y="{height + bottom - 3}" text-anchor="{anchor}">{_number(edges[i])}</text>')
    label = f"histogram of {counts.sum():,} activations from {_number(edges[0])} to {_number(edges[-1])}"
    return (
        f'<svg viewBox="0 0 {width} {height + bottom}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'
        "<p class='soft'>tokens (log scale) by activation (log scale)</p>"
    )


def _lens_section(index: FeatureIndex, j: int) -> str:
    up, down = index.lens_tokens(j), index.lens_tokens(j, bottom=True)
    if not up:
        return f"<section><h2>Logit lens</h2><p class='soft'>{escape(index.info['logit_lens'])}</p></section>"
    lists = [_token_list(index, [(token, f"{value:+.2f}") for token, value in side]) for side in (up, down)]
    return (
        f"<section><h2>Logit lens</h2><div class='pairs'><div><p>promotes</p>{lists[0]}</div>"
        f"<div class='down'><p>suppresses</p>{lists[1]}</div></div></section>"
    )


def _token_list(index: FeatureIndex, tokens: list[tuple[int, str]]) -> str:
    items = (f"<li><code>{_word(index, token)}</code><span>{text}</span></li>" for token, text in tokens)
    return f"<ol>{''.join(items)}</ol>"


def table_html(index: FeatureIndex, features: Sequence[int], heading: str) -> str:
    """The listed features as a table that sorts at a click on a heading and filters as one types; readable without its script."""
    numbers = ("density", "count", "max", "mean")
    head = "".join(
        f'<th class="num"><button>{name}</button></th>' if name in ("feature", *numbers) else f"<th><button>{name}</button></th>"
        for name in ("feature", *numbers, "promotes", "fires on", "strongest context")
    )
    rows = []
    for j in features:
        columns = index.feature(j).columns
        texts = (_percent(columns["density"]), f"{int(columns['count']):,}", _number(columns["max"]), _number(columns["mean"]))
        cells = [f'<td class="num" data-v="{j}"><a href="{j}.html">{j}</a></td>']
        cells += [f'<td class="num" data-v="{float(columns[name]):.6g}">{text}</td>' for name, text in zip(numbers, texts)]
        lists = (index.lens_tokens(j, 5), index.top_tokens(j, 3))
        cells += [f"<td class='tok'>{_words(index, tokens)}</td>" for tokens in lists]
        best = index.top_contexts(j, 1, before=6, after=4)
        text = "".join(_token_html(t, 0, True, i == best[0].centre, 0) for i, t in enumerate(best[0].texts)) if best else ""
        rows.append(f"<tr>{''.join(cells)}<td class='tok'>{text}</td></tr>")
    return (
        f"<h1>{escape(heading)}</h1><p class='soft'>{escape(index.info['site'])}, {index.info['tokens_scanned']:,} tokens scanned</p>"
        f"<p><input id='filter' type='search' placeholder='filter by token or number' aria-label='filter'> <span id='count' class='soft'>"
        f"{len(features)} of {len(features)}</span></p>\n<section class='scroll'><table><thead><tr>{head}</tr></thead><tbody>\n"
        + "\n".join(rows)
        + f"\n</tbody></table></section><script>{TABLE_SCRIPT}</script>"
    )


def _words(index: FeatureIndex, tokens: list) -> str:
    return " ".join(f"<code>{_word(index, token)}</code>" for token, _ in tokens)


def _word(index: FeatureIndex, token: int) -> str:
    """A token by itself, its spaces marked: " the" and "the" are different tokens."""
    return "".join('<i class="s"> </i>' if letter == " " else visible(letter) for letter in index.vocabulary.spelling(token))


def _number(value: float) -> str:
    """Three digits, without an exponent where that reads well."""
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _percent(share: float) -> str:
    return f"{100 * float(share):.3g}%"


def _short(count: int) -> str:
    return f"{count // 1000}k" if 1000 <= count < 10**6 else f"{count // 10**6}M" if count >= 10**6 else str(count)
