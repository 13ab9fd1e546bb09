"""The tokens of a cache: sequences of at most one context each, stored once, so that every activation leads back to its text."""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sae.activations.text.documents import Document
from sae.disk.reading import map_arrays, require_starts, require_within
from sae.disk.remote import Place
from sae.errors import InputError
from sae.progress import counted

SPLITS = ("train", "held_out")
PART_TOKENS = 1 << 24
"""Tokens per file, and so the number kept in memory while they are made: 64 MB."""


PART = {
    "ids": ("I32", "n"),
    "sequence_starts": ("I64", "s+1"),
    "sequence_document": ("I64", "s"),
    "document_label": ("I32", "d"),
    "sequence_split": ("U8", "s"),
}
"""Arrays of a token file."""


class Part(NamedTuple):
    """The content of one file under tokens/. A sequence is never divided between parts; a document may be."""

    ids: np.ndarray
    """int32 [n], all sequences end to end"""
    sequence_starts: np.ndarray
    """int64 [S+1], offsets into `ids`"""
    sequence_document: np.ndarray
    """int64 [S], document numbers counted over all parts"""
    document_label: np.ndarray
    """int32 [D], of the documents that start in this part; -1 for none"""
    sequence_split: np.ndarray
    """uint8 [S], index into SPLITS"""


@dataclass
class Tokens:
    """All parts joined; one part is memory-mapped, several are joined in memory (4 bytes per token)."""

    ids: np.ndarray
    sequence_starts: np.ndarray
    sequence_document: np.ndarray
    document_label: np.ndarray
    sequence_split: np.ndarray
    label_names: list[str]

    @classmethod
    def join(cls, parts: list[Part], label_names: list[str]) -> "Tokens":
        if len(parts) == 1:
            return cls(*parts[0], label_names)
        offsets = np.cumsum([0] + [len(part.ids) for part in parts])
        starts = [part.sequence_starts[:-1] + offset for part, offset in zip(parts, offsets)]
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([*starts, offsets[-1:]]),
            np.concatenate([part.sequence_document for part in parts]),
            np.concatenate([part.document_label for part in parts]),
            np.concatenate([part.sequence_split for part in parts]),
            label_names,
        )

    @classmethod
    def read(cls, paths: Sequence[Place], label_names: list[str]) -> "Tokens":
        """Raises `InputError` for a damaged file."""
        parts = []
        for path in paths:
            tensors, _ = map_arrays(path, "a cache's token file", PART, then="make the cache again")
            parts.append(Part(**{name: tensors[name] for name in Part._fields}))
            require_starts(parts[-1].sequence_starts, len(parts[-1].ids), "sequence_starts", path)
        tokens = cls.join(parts, label_names)
        documents, where = len(tokens.document_label), paths[0].parent
        require_within(tokens.ids, 0, 1 << 31, "ids", where)
        require_within(tokens.sequence_document, 0, documents, "sequence_document", where)
        require_within(tokens.document_label, -1, len(label_names), "document_label", where)
        require_within(tokens.sequence_split, 0, len(SPLITS), "sequence_split", where)
        return tokens

    def sequence_of(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the sequences that hold these global token positions, int64, of the same shape."""
        return np.searchsorted(self.sequence_starts, positions, side="right") - 1

    def window(self, position: int, before: int, after: int) -> tuple[np.ndarray, int]:
        """Ids around a token, at most `before` and `after` of them, never crossing its sequence; and the token's offset among them."""
        if not 0 <= position < len(self.ids):
            raise InputError(f"expected a token position below {len(self.ids)}, got {position}; take one from a shard's rows")
        sequence = int(self.sequence_of(np.asarray(position)))
        start = max(int(self.sequence_starts[sequence]), position - before)
        stop = min(int(self.sequence_starts[sequence + 1]), position + after + 1)
        return np.asarray(self.ids[start:stop]), position - start


def is_held_out(document: int, seed: int, fraction: float) -> bool:
    """Whether a document is held out from training: by a hash of its number, so that it does not depend on the number of other
    documents."""
    if document == 0:  # so that the shortest text still gives something to train on
        return False
    digest = hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


@dataclass
class Cutter:
    """Cuts documents of token ids into sequences: `bos_id` (if any) and at most `context` - 1 tokens; stops at `budget` tokens.

    A piece that starts with `bos_id` does not get a second one.
    """

    context: int
    budget: int
    bos_id: int | None
    seed: int
    held_out: float
    part_tokens: int = PART_TOKENS
    documents: int = 0
    empty_documents: int = 0
    sequences: int = 0
    tokens: int = 0
    _label_numbers: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def label_names(self) -> list[str]:
        """in order of first appearance"""
        return list(self._label_numbers)

    def parts(self, documents: Iterable[tuple[np.ndarray, str | None]]) -> Iterator[Part]:
        """Yields the parts; at the end at least one, unless there were no tokens. Counts are kept in the fields."""
        self._clear()
        for ids, label in documents:
            if len(ids) == 0:
                self.empty_documents += 1
                continue
            for number, piece in enumerate(self._pieces(ids)):
                if number == 0:
                    self._begin_document(label)
                self._add(piece)
                if self._pending >= self.part_tokens:
                    yield self._take()
            if self._room() <= 0:
                break
        if self._ids:
            yield self._take()

    def _room(self) -> int:
        """Number of tokens of text that still fit, in addition to the one that starts a sequence."""
        return self.budget - self.tokens - (self.bos_id is not None)

    def _pieces(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        width = self.context - (self.bos_id is not None)
        for start in range(0, len(ids), width):
            if self._room() <= 0:
                return
            piece = ids[start : start + width][: self._room()]
            yield piece if self.bos_id in (None, piece[0]) else np.concatenate([[self.bos_id], piece])

    def _begin_document(self, label: str | None) -> None:
        self._labels.append(-1 if label is None else self._label_numbers.setdefault(label, len(self._label_numbers)))
        self.documents += 1

    def _add(self, piece: np.ndarray) -> None:
        self._ids.append(piece)
        self._documents.append(self.documents - 1)
        self.sequences += 1
        self.tokens += len(piece)
        self._pending += len(piece)

    def _take(self) -> Part:
        splits = {n: is_held_out(n, self.seed, self.held_out) for n in set(self._documents)}
        part = Part(
            np.concatenate(self._ids).astype(np.int32),
            np.cumsum([0] + [len(piece) for piece in self._ids], dtype=np.int64),
            np.asarray(self._documents, dtype=np.int64),
            np.asarray(self._labels, dtype=np.int32),
            np.asarray([splits[n] for n in self._documents], dtype=np.uint8),
        )
        self._clear()
        return part

    def _clear(self) -> None:
        self._ids: list[np.ndarray] = []
        self._documents: list[int] = []
        self._labels: list[int] = []
        self._pending = 0


def tokenise(documents: Iterable[Document], tokenizer: Any, vocabulary: int, bos_id: int | None) -> Iterator[tuple[np.ndarray, str | None]]:
    """Documents as token ids, int32 [n], without `bos_id` at the beginning; documents given as ids are checked against the vocabulary.

    A line on stderr counts the documents that started with it, as a rendered chat template does.
    """
    began = 0
    try:
        for ids, label in _encoded(documents, tokenizer, vocabulary):
            if len(ids) and ids[0] == bos_id:
                began += 1
                ids = ids[np.logical_and.accumulate(ids == bos_id).sum() :]
            yield ids, label
    finally:  # also where the reader has enough
        if began:
            print(f"{counted(began, 'document')} already began with a beginning-of-text token, so no second one was added", file=sys.stderr)


def _encoded(documents: Iterable[Document], tokenizer: Any, vocabulary: int) -> Iterator[tuple[np.ndarray, str | None]]:
    for batch in _batched(documents, 64, 1 << 20):
        texts = [document.content for document in batch if isinstance(document.content, str)]
        if texts and tokenizer is None:
            raise InputError(
                "expected a model with a tokenizer, because the text is not token ids, but this model has none; add one to its folder"
            )
        encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        for document in batch:
            ids = np.asarray(next(encoded) if isinstance(document.content, str) else document.content, dtype=np.int32)
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
                raise InputError(
                    f"expected token ids below {vocabulary}, the model's vocabulary, got {ids.max()}; "
                    "the tokens were made with another tokenizer"
                )
            yield ids, document.label


def _batched(documents: Iterable[Document], count: int, size: int) -> Iterator[list[Document]]:
    """Groups of at most `count` documents and about `size` characters, for the tokenizer's threads and bounded memory."""
    batch, length = [], 0
    for document in documents:
        batch.append(document)
        length += len(document.content)
        if len(batch) >= count or length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
