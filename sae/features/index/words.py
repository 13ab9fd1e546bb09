"""Tokens as bytes and as text: pieces of a vocabulary, text that is exact where a character is split over tokens, words in a corpus.

v vocabulary · n tokens of a corpus, sequences end to end
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sae.errors import InputError
from sae.model.vocabulary import Vocabulary

BLOCK_TOKENS = 1 << 19  # tokens searched at a time: about 200 bytes of memory each
APOSTROPHES = "'’‘ʼ＇"  # as typed, and as word processors and telephones write them
LETTER = r"\w\u0300-\u036f"  # with the marks that follow a letter where it is written in parts
WORD = re.compile(rf"[{LETTER}]+(?:[{APOSTROPHES}][{LETTER}]+)*")


def folded(text: str) -> str:
    """The text normalised for searches: without case, accents composed, one kind of apostrophe."""
    plain = unicodedata.normalize("NFC", text).translate(dict.fromkeys(map(ord, APOSTROPHES), "'")).casefold()
    return unicodedata.normalize("NFC", plain)


def whole_words(words: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the words (or phrases) as whole words, in any spelling that `folded` makes equal."""
    spelled = ["".join(map(_spellings_of, unicodedata.normalize("NFC", word))) for word in sorted(words, key=len, reverse=True)]
    return re.compile(rf"(?<![{LETTER}])(?:{'|'.join(spelled)})(?![{LETTER}])", re.IGNORECASE)


def _spellings_of(letter: str) -> str:
    if letter in APOSTROPHES:
        return f"[{APOSTROPHES}]"
    parts = unicodedata.normalize("NFD", letter)
    forms = {unicodedata.normalize("NFC", parts[:i]) + parts[i:] for i in range(1, len(parts) + 1)} | {letter}
    return re.escape(letter) if len(forms) == 1 else f"(?:{'|'.join(map(re.escape, sorted(forms, key=len, reverse=True)))})"


class Occurrences(NamedTuple):
    """The places of words in a corpus, in order and not overlapping."""

    first: np.ndarray
    """token with the first piece of each occurrence, int64"""
    last: np.ndarray
    """token with its last piece, int64"""


def words_of(query: str | Sequence[str]) -> list[str]:
    """The words of "fuck|shit|damn" or of a list; `InputError` if there is none."""
    parts = [query] if isinstance(query, str) else query
    words = [word.strip() for part in parts for word in part.split("|") if word.strip()]
    if not words:
        raise InputError(f'expected a word, or several as "one|two", but got {query!r}')
    return words


def occurrences(words: Sequence[str], ids: np.ndarray, sequence_starts: np.ndarray, vocab: Vocabulary) -> Occurrences:
    """Tokens [n] that contain one of the words as a whole word in any case and spelling, also if it is split over several tokens.

    Special tokens and the ends of sequences separate words. Occurrences that share a token count as one.
    """
    spans = [spans for spans, _ in _found(whole_words(words), ids, sequence_starts, vocab)]
    first, last = np.concatenate([np.zeros((2, 0), np.int64), *spans], axis=1)
    heads = np.flatnonzero(np.r_[True, first[1:] > last[:-1]]) if len(first) else np.zeros(0, np.int64)
    return Occurrences(first[heads], last[np.r_[heads[1:], len(last)] - 1] if len(first) else last)


def all_words(ids: np.ndarray, sequence_starts: np.ndarray, vocab: Vocabulary) -> dict[str, np.ndarray]:
    """For every word, as `folded` writes it, the tokens that contain a piece of it, int64 and ascending. Separated as in `occurrences`."""
    found: dict[str, list[np.ndarray]] = {}
    for (firsts, lasts), texts in _found(WORD, ids, sequence_starts, vocab):
        for text, first, last in zip(texts, firsts.tolist(), lasts.tolist()):
            found.setdefault(folded(text), []).append(np.arange(first, last + 1))
    return {word: np.unique(np.concatenate(tokens)) for word, tokens in found.items()}


def _found(pattern: re.Pattern, ids: np.ndarray, sequence_starts: np.ndarray, vocab: Vocabulary) -> Iterator[tuple[np.ndarray, list[str]]]:
    """First and last token [2, matches] of what matches, and its text, block by block."""
    pieces = [b"\n" if s else p for p, s in zip(vocab.pieces, vocab.special)] + [b"\n"]  # the last one parts sequences
    lengths, blob = np.array([len(p) for p in pieces]), np.frombuffer(b"".join(pieces), np.uint8)
    stops = np.append(sequence_starts[1:], len(ids))
    begin = 0
    while begin < len(stops):  # whole sequences, as many as fit a block
        end = max(begin + 1, int(np.searchsorted(stops, sequence_starts[begin] + BLOCK_TOKENS, "right")))
        low, high = int(sequence_starts[begin]), int(stops[end - 1])
        starts = np.asarray(sequence_starts[begin:end]) - low
        parted = np.insert(np.asarray(ids[low:high], np.int64), starts, len(pieces) - 1)
        origin = np.insert(np.arange(low, high), starts, -1)
        spans, texts = _token_spans(pattern, parted, lengths, blob)
        yield origin[spans], texts
        begin = end


def _token_spans(pattern: re.Pattern, tokens: np.ndarray, lengths: np.ndarray, blob: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """First and last token [2, matches] of `pattern` in the text of `tokens`, and the matches.

    The vocabulary's pieces lie one after another in `blob`.
    """
    length = lengths[tokens]
    ends = np.cumsum(length)
    starts = ends - length
    piece_starts = np.cumsum(lengths) - lengths
    data = blob[np.repeat(piece_starts[tokens] - starts, length) + np.arange(ends[-1] if len(ends) else 0)]
    text = data.tobytes().decode("utf-8", "surrogateescape")
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    escaped = (code >= 0xDC80) & (code <= 0xDCFF)  # one undecodable byte each
    byte_of = np.r_[0, np.cumsum(1 + ((code >= 0x80) & ~escaped) + ((code >= 0x800) & ~escaped) + (code >= 0x10000))]
    matches = list(pattern.finditer(text))
    spans = byte_of[np.array([m.span() for m in matches], np.int64).reshape(-1, 2)]
    tokens_of = np.stack([np.searchsorted(ends, spans[:, 0], "right"), np.searchsorted(starts, spans[:, 1], "left") - 1])
    return tokens_of, [m.group() for m in matches]
