"""Text input by users: a single string is not a list of its letters, and halves of surrogate pairs, which UTF-8 cannot write, are
replaced."""

import json
import re
import warnings
from collections.abc import Iterable
from typing import Any

from sae.errors import InputError

_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> tuple[str, int]:
    """The text with U+FFFD for each half of a surrogate pair, which UTF-8 cannot write and no tokenizer reads, and how many there were."""
    return (text, 0) if text.isascii() else _SURROGATE.subn("\ufffd", text)


def replace_surrogates_in(value: Any) -> tuple[Any, int]:
    """The same for all texts of a value from JSON."""
    text, count = replace_surrogates(json.dumps(value, ensure_ascii=False))
    return (json.loads(text), count) if count else (value, 0)


def text_list(texts: Iterable[str], what: str = "texts") -> list[str]:
    """Strings as a list; halves of surrogate pairs are replaced, and a warning counts them.

    Raises `InputError`, which calls the parameter `what`, for a single string, which would be a list of its letters, and for an item that
    is not a string.
    """
    if isinstance(texts, (str, bytes)):
        raise InputError(f"expected {what} to be a list of strings, got the single string {texts!r:.60}; write it in brackets, [...]")
    try:
        listed = list(texts)
    except TypeError:
        raise InputError(f"expected {what} to be a list of strings, got {type(texts).__name__}") from None
    for number, text in enumerate(listed):
        if not isinstance(text, str):
            raise InputError(f"expected {what} to be a list of strings, got {type(text).__name__} at position {number}")
    cleaned = [replace_surrogates(text) for text in listed]
    if replaced := sum(count for _, count in cleaned):
        warnings.warn(f"halves of surrogate pairs in {what} are replaced by U+FFFD ({replaced:,}): UTF-8 cannot write them", stacklevel=3)
    return [text for text, _ in cleaned]
