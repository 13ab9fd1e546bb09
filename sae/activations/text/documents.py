"""Texts to harvest from: files, folders, globs, `datasets` names and token files, as one stream of documents."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from sae.activations.text.datasets_errors import told_plainly
from sae.disk.reading import map_arrays, parse_json, require_starts, require_within
from sae.errors import InputError
from sae.progress import counted
from sae.text_input import replace_surrogates, text_list

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
PASSAGE = 8192
"""Characters: a .txt file has no documents, so it is cut at the first line end after this many."""


@dataclass(kw_only=True)
class TextConfig:
    """The source of the text."""

    text: tuple[str, ...] = ()
    """Files (.txt, .jsonl, .json, .parquet, the first three also as .gz; .safetensors with token ids), folders or globs."""
    text_field: str = "text"
    """Field (column) that holds the text of a document."""
    label_field: str | None = None
    """Field (column) that holds a document's label, for example its domain."""
    dataset: str | None = None
    """Name or folder for `datasets.load_dataset`, instead of --text."""
    dataset_config: str | None = None
    """Configuration of the dataset."""
    dataset_split: str = "train"
    """Split of the dataset."""
    streaming: bool = False
    """Stream the dataset instead of downloading it first."""


class Document(NamedTuple):
    content: str | np.ndarray
    """text, or token ids int32 [n]; `tokenise` removes a beginning-of-text token"""
    label: str | None


def documents(config: TextConfig) -> Iterator[Document]:
    """All documents of the source, in order; one with only blanks is empty. Halves of surrogate pairs become U+FFFD, and a line on stderr
    counts the documents with some.

    Raises `InputError` for a file that is missing, damaged, binary or without the field asked for.
    """
    broken = 0
    try:
        for content, label in _read(config):
            halves = 0
            if isinstance(content, str):
                content, halves = ("", 0) if content.isspace() else replace_surrogates(content)
            if label is not None:
                label, more = replace_surrogates(label)
                halves += more
            broken += halves > 0
            yield Document(content, label)
    finally:  # also where the reader has enough
        if broken:
            held = f"{counted(broken, 'document')} held halves of surrogate pairs"
            print(f"{held}, which are no characters; they are now U+FFFD", file=sys.stderr)


def _read(config: TextConfig) -> Iterator[Document]:
    if config.dataset:
        yield from _read_dataset(config, config.dataset)
    for path in text_files(config):
        if path.stat().st_size == 0:
            print(f"{path} is empty and left out", file=sys.stderr)
        elif path.suffix == ".safetensors":
            yield from _read_tokens(path)
        else:
            yield from _read_file(path, config)


def check_source(config: TextConfig) -> None:
    """Raises `InputError` unless the options name one source, and all given options apply to it."""
    if bool(config.text) == bool(config.dataset):
        found = "both" if config.text else "neither"
        raise InputError(f"expected text from --text or from --dataset, got {found}; give one of them")
    given = [n for n in ("dataset_config", "dataset_split", "streaming") if getattr(config, n) != getattr(TextConfig(), n)]
    if config.text and given:
        raise InputError(f"--{given[0].replace('_', '-')} belongs to --dataset, but --text was given; leave one of them out")
    fields_chosen = config.text_field != "text" or config.label_field is not None
    if config.text and fields_chosen and not any(_kind(path) in (".jsonl", ".json", ".parquet") for path in text_files(config)):
        raise InputError("--text-field and --label-field choose fields of .jsonl, .json or .parquet, but --text names no such file")


def text_files(config: TextConfig) -> list[Path]:
    """The files of `--text`, with folders and globs resolved in alphabetical order."""
    found: list[Path] = []
    for name in text_list(config.text, "text"):
        path = Path(name)
        if path.is_dir():
            # token files and model weights look alike, so a folder stands for its texts only
            files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in TEXT_SUFFIXES)
        else:
            files = [path] if path.is_file() else sorted(p for p in map(Path, glob(name, recursive=True)) if p.is_file())
        if not files:
            raise InputError(f"expected text at {name}, but no {', '.join(TEXT_SUFFIXES)} file is there; check the path")
        found += files
    for path in found:
        if _kind(path) not in (*TEXT_SUFFIXES, ".safetensors"):
            raise InputError(f"expected a {', '.join(TEXT_SUFFIXES)} or token .safetensors file, but {path} is none; rename or convert it")
    return found


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _read_file(path: Path, config: TextConfig) -> Iterator[Document]:
    import pyarrow

    read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}[_kind(path)]
    try:
        yield from read(path, config)
    except UnicodeDecodeError:
        raise InputError(f"expected UTF-8 text in {path}, but {_undecodable(path)} is not; convert or remove the file") from None
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise InputError(f"expected a whole {''.join(path.suffixes[-2:])} file at {path}, but it is damaged ({error})") from None


def _open(path: Path, **encoding: str) -> IO[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", **{"encoding": "utf-8-sig", **encoding})


def _undecodable(path: Path) -> str:
    """The position in the file; Python's own error counts from the beginning of a block."""
    with _open(path, errors="surrogateescape") as file:
        return next((f"line {number}" for number, line in enumerate(file, 1) if replace_surrogates(line)[1]), "the end")


def _read_txt(path: Path, config: TextConfig) -> Iterator[Document]:
    passage, length = [], 0
    with _open(path) as file:
        while line := file.readline(1 << 16):  # bounded: a file may be one endless line
            if "\0" in line:
                raise InputError(f"expected text in {path}, but it holds zero bytes, so it is binary; name a text file")
            passage.append(line)
            length += len(line)
            if length >= PASSAGE:
                yield Document("".join(passage), None)
                passage, length = [], 0
    yield Document("".join(passage), None)


def _read_jsonl(path: Path, config: TextConfig) -> Iterator[Document]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"line {number} of {path}"
                yield _document(parse_json(line, f"JSON in {where}"), config, where)


def _read_json(path: Path, config: TextConfig) -> Iterator[Document]:
    with _open(path) as file:
        rows = parse_json(file.read(), f"JSON in {path}")
    if not isinstance(rows, list):
        raise InputError(f"expected a JSON list of objects in {path}, but it holds a {type(rows).__name__}; use .jsonl or a list")
    for number, row in enumerate(rows, 1):
        yield _document(row, config, f"entry {number} of {path}")


def _read_parquet(path: Path, config: TextConfig) -> Iterator[Document]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    wanted = [name for name in (config.text_field, config.label_field) if name]
    _require_fields(wanted, file.schema_arrow.names, str(path))
    number = 0
    for batch in file.iter_batches(1024, columns=wanted):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            raise InputError(f"expected UTF-8 text in {path}, but in rows {number + 1} to {number + len(batch)} one is not") from None
        for row in rows:
            number += 1
            yield _document(row, config, f"row {number} of {path}")


def _read_dataset(config: TextConfig, name: str) -> Iterator[Document]:
    for number, row in enumerate(_dataset_rows(config, name), 1):
        yield _document(row, config, f"row {number} of dataset {name}")


def _dataset_rows(config: TextConfig, name: str) -> Iterator[Any]:
    with told_plainly(f"a dataset named {name!r} with split {config.dataset_split!r}"):
        import datasets

        yield from datasets.load_dataset(name, config.dataset_config, split=config.dataset_split, streaming=config.streaming)


def _require_fields(wanted: list[str], present: list[str], where: str) -> None:
    for name in wanted:
        if name not in present:
            raise InputError(
                f"expected the field {name!r} in {where}, which has {', '.join(map(repr, present)) or 'none'}; "
                "choose with --text-field and --label-field"
            )


def _document(row: Any, config: TextConfig, where: str) -> Document:
    if not isinstance(row, dict):
        raise InputError(f"expected an object with fields at {where}, but it holds a {type(row).__name__}; repair the file")
    _require_fields([name for name in (config.text_field, config.label_field) if name], list(row), where)
    text = row[config.text_field]
    label = row[config.label_field] if config.label_field else None
    if not isinstance(text, str | None):
        raise InputError(f"expected text in the field {config.text_field!r} at {where}, but it holds a {type(text).__name__}")
    return Document(text or "", None if label is None else str(label))


def _read_tokens(path: Path) -> Iterator[Document]:
    """A token file: ids [n], document_starts [D+1], optionally document_label [D] with label_names in the metadata."""
    integers = "U8 U16 I16 U32 I32 I64"
    schema = {"ids": (integers, "n"), "document_starts": (integers, "d+1")}
    tensors, metadata = map_arrays(path, "a token file", schema)
    ids, starts, labels = tensors["ids"], tensors["document_starts"].astype(np.int64), tensors.get("document_label")
    require_starts(starts, len(ids), "document_starts", path)
    require_within(ids, 0, 1 << 31, "ids", path)
    names = parse_json(metadata.get("label_names", "[]"), f"a list of label_names in {path}", list[str])
    if labels is not None:
        if labels.dtype.kind not in "iu" or labels.shape != (len(starts) - 1,):
            raise InputError(f"expected one document_label, an index into label_names, per document in {path}; make the file again")
        require_within(labels, -1, len(names), "document_label", path)
    for document in range(len(starts) - 1):
        content = np.asarray(ids[starts[document] : starts[document + 1]], dtype=np.int32)
        label = -1 if labels is None else int(labels[document])
        yield Document(content, names[label] if label >= 0 else None)
