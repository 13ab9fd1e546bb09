"""Every way in gives the same documents, and unusable input is named in a sentence."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from sae.activations.text import PASSAGE, TextConfig, check_source, documents, text_files
from sae.errors import InputError

ROWS = [{"text": "one", "domain": "a", "n": 1}, {"text": "zwei — ü", "domain": "b", "n": 2}, {"text": "", "domain": None, "n": 3}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(*names: object, **options) -> list[tuple]:
    config = TextConfig(text=tuple(map(str, names)), **options)
    check_source(config)
    return [(d.content.tolist() if isinstance(d.content, np.ndarray) else d.content, d.label) for d in documents(config, bos_id=0)]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"])
def test_structured_files_give_the_same_documents(files, name):
    assert read(files / name, label_field="domain") == [("one", "a"), ("zwei — ü", "b"), ("", None)]
    assert read(files / name) == [("one", None), ("zwei — ü", None), ("", None)]


def test_folders_and_globs_are_read_in_order(files):
    assert [path.name for path in text_files(TextConfig(text=(str(files),)))] == ["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"]
    assert len(read(files / "*.json*", files / "d.parquet")) == 12


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_like_its_file(files, streaming, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "train.parquet").write_bytes((files / "d.parquet").read_bytes())
    config = TextConfig(dataset=str(folder), label_field="domain", streaming=streaming)
    assert list(documents(config)) == [("one", "a"), ("zwei — ü", "b"), ("", None)]
    with pytest.raises(InputError, match="split 'nope'"):
        list(documents(TextConfig(dataset=str(folder), dataset_split="nope", streaming=streaming)))


def test_a_text_file_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    text = "".join(f"line {i} of a long text\n" for i in range(3000)) + "the end without a line end"
    (tmp_path / "a.txt").write_text(text)
    found = [content for content, _ in read(tmp_path / "a.txt")]
    assert "".join(found) == text
    assert all(PASSAGE <= len(content) < PASSAGE + 40 and content.endswith("\n") for content in found[:-1])
    assert len(found) > 5


def token_file(path, names=("prose", "verse"), **changes):
    tensors = {
        "ids": torch.tensor([0, 5, 6, 0, 7, 0], dtype=torch.int32).to(torch.uint16),
        "document_starts": torch.tensor([0, 3, 5, 6]),
        "document_label": torch.tensor([1, 0, 1], dtype=torch.uint8),
    }
    save_file({k: v for k, v in {**tensors, **changes}.items() if v is not None}, path, {"label_names": json.dumps(names)})
    return path


def test_a_token_file_gives_ids_without_their_beginning_of_text(tmp_path):
    expected = [([5, 6], "verse"), ([7], "prose"), ([], "verse")]
    assert read(token_file(tmp_path / "t.safetensors")) == expected
    unlabelled = token_file(tmp_path / "u.safetensors", document_label=None)
    assert read(unlabelled) == [(content, None) for content, _ in expected]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "ids and document_starts"),
        ({"document_starts": torch.tensor([0, 3, 2, 6])}, "rise from 0"),
        ({"document_starts": torch.tensor([0, 3, 5, 9])}, "rise from 0"),
        ({"document_label": torch.tensor([0, 1, 2], dtype=torch.uint8)}, "document_label"),
        ({"document_label": torch.tensor([0], dtype=torch.uint8)}, "document_label"),
    ],
)
def test_a_token_file_that_contradicts_itself_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read(token_file(tmp_path / "t.safetensors", **changes))


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("x.txt", b"text\0text", {}, "binary"),
        ("x.txt", bytes(range(128, 256)), {}, "UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', {}, "line 2"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', {}, "'text' in line 2.*'body'"),
        ("x.jsonl", b'{"text": 5}\n', {}, "holds a int"),
        ("x.jsonl", b'["text"]\n', {}, "holds a list"),
        ("x.jsonl", LINES.encode(), {"text_field": "body"}, "'body'.*'text', 'domain'"),
        ("x.jsonl", LINES.encode(), {"label_field": "topic"}, "'topic'"),
        ("x.json", b'{"text": "a"}', {}, "JSON list"),
        ("x.jsonl.gz", gzip.compress(LINES.encode() * 99)[:-20], {}, "damaged"),
        ("x.jsonl.gz", b"not gzip at all", {}, "damaged"),
        ("x.parquet", b"PAR1 and nothing more", {}, "damaged"),
        ("x.safetensors", b"\xff" * 64, {}, "damaged"),
        ("x.docx", b"text", {}, "x.docx is none"),
        ("x.txt", b"text", {"label_field": "domain"}, "names no such file"),
        ("x.txt", b"text", {"streaming": True}, "--streaming belongs to --dataset"),
        ("x.txt", b"text", {"dataset": "y"}, "both"),
    ],
)
def test_unusable_input_is_named_in_a_sentence(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name, **options)


def test_missing_input_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match=r"no \.txt"):
        read(tmp_path)
    with pytest.raises(InputError, match="neither"):
        read()
