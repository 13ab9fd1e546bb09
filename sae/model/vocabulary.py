"""Tokens as bytes and as text, for any kind of tokenizer."""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sae.errors import InputError


class Vocabulary(NamedTuple):
    """The text of each token id."""

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
    """Text of every token of `ids`, as in `Vocabulary.texts`, directly from a Hugging Face tokenizer."""
    return vocabulary(tokenizer).texts(ids)


def vocabulary(tokenizer: Any, size: int = 0) -> Vocabulary:
    """Pieces of a Hugging Face tokenizer, padded with empty ones to `size` (models round their vocabulary up).

    Byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece with byte fallback (Llama 2, Gemma) are taken to their bytes; any other
    tokenizer gets the text that its own `decode` returns for the single token.
    """
    if tokenizer is None:
        raise InputError("expected a model with a tokenizer, but this one has none, so token ids cannot be shown as text")
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
