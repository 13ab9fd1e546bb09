"""Contexts as lines of HTML: the firing token of every line in one column, every character of the corpus kept and escaped.

The text of a line is one run of inline elements, so that a copy of it is the exact text, line breaks included.
"""

import math
from html import escape
from typing import TYPE_CHECKING

from sae.html import number, visible

if TYPE_CHECKING:
    from sae.features.index.reader import Context


LEVELS = 9  # shades of activation


def row_html(context: "Context", top: float) -> str:
    """One line: activation, the document's label, left context, and the firing token with the text after it; `top` gets the full shade."""
    texts, values, scanned, centre = context.texts, context.values.tolist(), context.scanned.tolist(), context.centre
    if "" in texts:
        texts, values, scanned, centre = whole_characters(texts, values, scanned, centre)
    parts = [visible(text) for text in texts]
    if not all(scanned):
        parts = [part if seen or not part else f"<u>{part}</u>" for part, seen in zip(parts, scanned)]
    for i, value in enumerate(values):
        if value or i == centre:
            parts[i] = token_html(texts[i], value, i == centre, top)
    label = escape(context.label or "")
    return (
        f'<div class="row" tabindex="0"><span class="v">{number(context.value)}</span><span class="g" title="{label}">{label}</span>'
        f'<span class="w"><span class="l"><span dir="ltr">{"".join(parts[:centre])}</span></span>{"".join(parts[centre:])}</span></div>'
    )


def whole_characters(
    texts: list[str], values: list[float], scanned: list[bool], centre: int
) -> tuple[list[str], list[float], list[bool], int]:
    """The tokens of a character that is split over several shown as one, with the highest of their activations."""
    ends = [i for i, text in enumerate(texts) if text or i + 1 == len(texts)]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return (
        [texts[end] for end in ends],
        [max(values[start : end + 1], key=abs) for start, end in zip(starts, ends)],
        [any(scanned[start : end + 1]) for start, end in zip(starts, ends)],
        next(i for i, end in enumerate(ends) if end >= centre),
    )


def token_html(text: str, value: float, own: bool, top: float) -> str:
    """A token that fires, or (`own`) the row's own token."""
    level = max(1, min(LEVELS, math.ceil(LEVELS * abs(value) / top))) if top > 0 else 1
    names = [f"a{level}", *("m",) * (value < 0), *("c",) * own]
    kind = (
        names[0] if len(names) == 1 else f'"{" ".join(names)}"'
    )  # most of a dense feature's page is these tags, so no byte more than HTML asks for
    return f"<b class={kind} title={number(value)}>{visible(text)}</b>"
