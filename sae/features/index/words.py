"""Tokens as bytes and as text: pieces of a vocabulary, text that is exact where a character is split over tokens, words in a corpus.

v vocabulary · n tokens of a corpus, sequences end to end
"""

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sae.errors import InputError

BLOCK_TOKENS = 1 << 19  # tokens searched at a time: about 200 bytes of memory each
APOSTROPHES = "'’‘ʼ＇"  # as typed, and as word processors and telephones write them
LETTER = r"\w\u0300-\u036f"  # with the marks that follow a letter where it is written in parts


class Vocabulary(NamedTuple):
    """What each token id stands for."""

    pieces: list[bytes]
    """bytes of every id, [v]; the pieces of a text, joined, are the text"""
    special: np.ndarray
    """bool [v]: markers such as beginning-of-text, which are no text"""

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Text of every token; a character split over tokens stands whole at the token that completes it, "" at those before.

        A character that the end cuts off is not shown; bytes that are no UTF-8 are shown as "\ufffd".
        """
        try:
            pieces = [self.pieces[i] for i in ids]
        except IndexError:
            raise InputError(f"expected token ids below {len(self.pieces)}, but there is one beyond: the index is damaged") from None
        texts = [_whole(piece) for piece in pieces]
        if None not in texts:  # nearly all windows: five times as fast
            return texts  # type: ignore[return-value]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(piece) for piece in pieces]

    def spelling(self, token: int) -> str:
        """The token's own text, for lists of tokens; bytes that are no whole character are written as \\xNN."""
        if not 0 <= token < len(self.pieces):
            raise InputError(f"expected token ids below {len(self.pieces)}, got {token}: the index is damaged")
        return self.pieces[token].decode("utf-8", "backslashreplace")


@lru_cache(1 << 18)
def _whole(piece: bytes) -> str | None:
    """Text of a piece that holds whole characters only, else None."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of every token of `ids`, as `Vocabulary.texts` gives it, straight from a Hugging Face tokenizer."""
    return vocabulary(tokenizer).texts(ids)


def vocabulary(tokenizer: Any, size: int = 0) -> Vocabulary:
    """Pieces of a Hugging Face tokenizer, padded with empty ones to `size` (models round their vocabulary up).

    Byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece with byte fallback (Llama 2, Gemma) are taken to their bytes; any other
    tokenizer gives the text that its own `decode` has for the single token.
    """
    if tokenizer is None:
        raise InputError("expected a model with a tokenizer, but this one has none; token ids cannot be shown as text without it")
    size = max(size, len(tokenizer))
    kind = _decoder_kind(tokenizer)
    added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    letters = _byte_letters()
    pieces = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if i in added or token is None:
            pieces.append(added.get(i, "").encode())
        elif kind == "byte_level":
            pieces.append(b"".join(bytes([letters[c]]) if c in letters else c.encode() for c in token))
        elif kind == "byte_fallback":
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            pieces.append(bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode())
        else:
            pieces.append(tokenizer.decode([i]).encode())
    special = np.zeros(size, bool)
    special[[i for i in tokenizer.all_special_ids if i < size]] = True
    special[[int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special]] = True
    return Vocabulary(pieces + [b""] * (size - len(pieces)), special)


def _decoder_kind(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    names = re.findall(r'"type":\s*"(\w+)"', json.dumps(json.loads(backend.to_str())["decoder"])) if backend is not None else []
    if "ByteLevel" in names:
        return "byte_level"
    return "byte_fallback" if "ByteFallback" in names or "Metaspace" in names else "other"


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte (GPT-2's table: printable ones stand for themselves, the rest from 256 on)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def folded(text: str) -> str:
    """The text as searches compare it: without case, accents composed, one kind of apostrophe."""
    plain = unicodedata.normalize("NFC", text).translate(dict.fromkeys(map(ord, APOSTROPHES), "'")).casefold()
    return unicodedata.normalize("NFC", plain)


def whole_words(words: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the words (or phrases) where it stands by itself, in any spelling that `folded` makes equal to it."""
    spelled = ["".join(map(_spellings_of, unicodedata.normalize("NFC", word))) for word in sorted(words, key=len, reverse=True)]
    return re.compile(rf"(?<![{LETTER}])(?:{'|'.join(spelled)})(?![{LETTER}])", re.IGNORECASE)


def _spellings_of(letter: str) -> str:
    if letter in APOSTROPHES:
        return f"[{APOSTROPHES}]"
    parts = unicodedata.normalize("NFD", letter)
    forms = {unicodedata.normalize("NFC", parts[:i]) + parts[i:] for i in range(1, len(parts) + 1)} | {letter}
    return re.escape(letter) if len(forms) == 1 else f"(?:{'|'.join(map(re.escape, sorted(forms, key=len, reverse=True)))})"


class Occurrences(NamedTuple):
    """Where words stand in a corpus, in order and not overlapping."""

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
    """Tokens [n] that hold one of the words as a whole word in any case and spelling, also where it is split over several tokens.

    Special tokens and the ends of sequences part words. Occurrences that share a token count as one.
    """
    pattern = whole_words(words)
    pieces = [b"\n" if s else p for p, s in zip(vocab.pieces, vocab.special)] + [b"\n"]  # the last one parts sequences
    lengths, blob = np.array([len(p) for p in pieces]), np.frombuffer(b"".join(pieces), np.uint8)
    spans = [np.zeros((2, 0), np.int64)]
    stops = np.append(sequence_starts[1:], len(ids))
    begin = 0
    while begin < len(stops):  # whole sequences, as many as fit a block
        end = max(begin + 1, int(np.searchsorted(stops, sequence_starts[begin] + BLOCK_TOKENS, "right")))
        low, high = int(sequence_starts[begin]), int(stops[end - 1])
        starts = np.asarray(sequence_starts[begin:end]) - low
        parted = np.insert(np.asarray(ids[low:high], np.int64), starts, len(pieces) - 1)
        origin = np.insert(np.arange(low, high), starts, -1)
        spans.append(origin[_token_spans(pattern, parted, lengths, blob)])
        begin = end
    first, last = np.concatenate(spans, axis=1)
    heads = np.flatnonzero(np.r_[True, first[1:] > last[:-1]]) if len(first) else np.zeros(0, np.int64)
    return Occurrences(first[heads], last[np.r_[heads[1:], len(last)] - 1] if len(first) else last)


def _token_spans(pattern: re.Pattern, tokens: np.ndarray, lengths: np.ndarray, blob: np.ndarray) -> np.ndarray:
    """First and last token [2, matches] of `pattern` in the text of `tokens`; the vocabulary's pieces lie one after another in `blob`."""
    length = lengths[tokens]
    ends = np.cumsum(length)
    starts = ends - length
    piece_starts = np.cumsum(lengths) - lengths
    data = blob[np.repeat(piece_starts[tokens] - starts, length) + np.arange(ends[-1] if len(ends) else 0)]
    text = data.tobytes().decode("utf-8", "surrogateescape")
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    escaped = (code >= 0xDC80) & (code <= 0xDCFF)  # one undecodable byte each
    byte_of = np.r_[0, np.cumsum(1 + ((code >= 0x80) & ~escaped) + ((code >= 0x800) & ~escaped) + (code >= 0x10000))]
    found = np.array([m.span() for m in pattern.finditer(text)], np.int64).reshape(-1, 2)
    spans = byte_of[found]
    return np.stack([np.searchsorted(ends, spans[:, 0], "right"), np.searchsorted(starts, spans[:, 1], "left") - 1])
