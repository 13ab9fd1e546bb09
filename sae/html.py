"""HTML parts of every page: the frame of a complete page, text that is escaped and visible, numbers as people read them."""

import math
from functools import lru_cache
from html import escape

DIRECTION_MARKS = {*range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x061C}  # would turn a row's order about
BREAKS = {"\n": '<i class="n">\n</i>', "\t": '<i class="t">\t</i>', "\r": '<i class="q">&#13;</i>'}


def document(title: str, body: str, style: str, policy: str) -> str:
    """A whole page that loads nothing; `policy` is its Content-Security-Policy."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


@lru_cache(1 << 16)
def visible(text: str) -> str:
    """Escaped text in which line breaks, tabs and characters that cannot be seen carry a mark; the element's text stays the same,
    except for control characters that HTML does not allow, which become their pictures, and marks of direction, which become their
    code."""
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


@lru_cache(1 << 16)
def word_html(spelling: str) -> str:
    """A single token, its spaces marked: " the" and "the" are different tokens."""
    return "".join('<i class="s"> </i>' if letter == " " else visible(letter) for letter in spelling)


def number(value: float) -> str:
    """Three digits, without an exponent if that is readable."""
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def figure(value: float | None, signed: bool = False) -> str:
    """A number in a report: three digits, a true minus sign, "–" for none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.1e}" if value and (abs(value) < 0.001 or abs(value) >= 1e5) else number(value)
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")


def percent(share: float) -> str:
    return f"{100 * float(share):.3g}%"


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers between `low` and `high`: 1, 2 or 5 times a power of ten apart, 0 exactly where it is among them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]
