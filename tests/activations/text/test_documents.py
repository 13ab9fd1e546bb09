"""Every way in gives the same documents, and unusable input is named in a sentence."""

import gzip
import io
import json
import logging
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from sae.activations.text.documents import PASSAGE, TextConfig, check_source, documents, text_files
from sae.errors import InputError

ROWS = [{"text": "one", "domain": "a", "n": 1}, {"text": "zwei — ü", "domain": "b", "n": 2}, {"text": "", "domain": None, "n": 3}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(*names: object, **options) -> list[tuple]:
    config = TextConfig(text=tuple(map(str, names)), **options)
    check_source(config)
    return [(d.content.tolist() if isinstance(d.content, np.ndarray) else d.content, d.label) for d in documents(config)]


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


def test_a_token_file_gives_ids_and_labels(tmp_path):
    expected = [([0, 5, 6], "verse"), ([0, 7], "prose"), ([0], "verse")]
    assert read(token_file(tmp_path / "t.safetensors")) == expected
    unlabelled = token_file(tmp_path / "u.safetensors", document_label=None)
    assert read(unlabelled) == [(content, None) for content, _ in expected]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "the array .ids. in"),
        ({"document_starts": torch.tensor([0, 3, 2, 6])}, "rise from 0"),
        ({"document_starts": torch.tensor([0, 3, 5, 9])}, "rise from 0"),
        ({"document_label": torch.tensor([0, 1, 2], dtype=torch.uint8)}, "document_label"),
        ({"document_label": torch.tensor([0], dtype=torch.uint8)}, "document_label"),
    ],
)
def test_a_token_file_that_contradicts_itself_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read(token_file(tmp_path / "t.safetensors", **changes))


def half_parquet() -> bytes:
    """1,030 rows, the last one with half a surrogate pair as other writers leave it."""
    texts = pyarrow.array([b"x"] * 1029 + [b"x \xed\xa0\xbd"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("x.txt", b"text\0text", {}, "binary"),
        ("x.txt", b"first\nsecond \xff\n", {}, "UTF-8 .* line 2 "),
        ("x.txt.gz", gzip.compress(b"text\n" * 9999 + b"\xed\xa0\xbd"), {}, "UTF-8 .* line 10000 "),
        ("x.json", b'[{"text": "a"},\n{"text": "\xed\xa0\xbd"}]', {}, "UTF-8 .* line 2 "),
        ("x.parquet", half_parquet(), {}, "UTF-8 .* rows 1025 to 1030"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', {}, "line 2"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', {}, "UTF-8 .* line 2 "),
        ("x.jsonl", '{"text": "a"}\n'.encode("utf-16"), {}, "UTF-8 .* line 1 "),
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


HALF = json.dumps([{"text": "x \ud83d", "domain": "a"}, {"text": "😀", "domain": "\udc00b"}, {"text": "c", "domain": "c"}])
WHOLE = [("x \ufffd", "a"), ("😀", "\ufffdb"), ("c", "c")]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_halves_of_characters_are_replaced_and_counted(tmp_path, name, capsys):
    lines = "".join(json.dumps(row) + "\n" for row in json.loads(HALF))
    content = (HALF if name == "a.json" else lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(tmp_path / name, label_field="domain") == WHOLE
    assert capsys.readouterr().err.startswith("2 documents held halves of surrogate pairs")
    some = documents(TextConfig(text=(str(tmp_path / name),)))
    next(some)
    del some  # a reader that has enough is told too
    assert capsys.readouterr().err.startswith("1 document held halves")


def test_halves_of_characters_in_a_token_files_labels_are_replaced(tmp_path):
    found = read(token_file(tmp_path / "t.safetensors", names=["prose", "\ud83dverse"]))
    assert [label for _, label in found] == ["\ufffdverse", "prose", "\ufffdverse"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = {"a.txt": "one", "a.jsonl": '{"text": "one"}\n', "a.json": '[{"text": "one"}]'}[name.removesuffix(".gz")].encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert read(tmp_path / name) == [("one", None)]


def parquet(*rows: dict) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": b'{"text": "a"}\n', "b.jsonl": b'{"text": "b", "x": 1}\n'}, r"b\.jsonl.*columns.*'x'"),
        ({"a.parquet": parquet({"text": "a"}), "b.parquet": parquet({"text": "b", "x": 1})}, r"b\.parquet.*columns.*'x'"),
        ({"a.parquet": parquet({"text": "a"}), "b.parquet": parquet({"text": [1, 2]})}, r"b\.parquet"),
        ({"a.parquet": parquet(*[{"text": "a" * 99}] * 99)[:-50]}, r"a\.parquet"),
        ({"a.jsonl": b'{"text": "a"}\n{"text": "b'}, r"a\.jsonl"),
        ({"a.jsonl": b'{"text": "x \\ud83d"}\n'}, r"a\.jsonl.*surrogate"),
        ({"a.jsonl": b'{"text": "a"}\n{"text": {"b": 1}}\n'}, "row 2"),
        ({"a.jsonl": b'{"text": "\xff"}\n'}, "codec"),
        ({"a.csv": b'text\n"a\n'}, r"a\.csv"),
        ({"a.txt": b"\xff\xfe\n"}, r"a\.txt"),
        ({"data.py": b"import datasets\n"}, "scripts"),
        ({}, "any data files"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_whatever_goes_wrong_in_a_dataset_is_one_sentence(tmp_path, monkeypatch, capfd, streaming, files, message):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        list(documents(TextConfig(dataset=str(folder), streaming=streaming)))
    said = str(raised.value)
    assert "\n" not in said
    assert len(said) < 500 + 2 * len(str(folder))
    err = capfd.readouterr().err
    assert all("Generating" in line for line in err.splitlines() if line.strip()), err  # the bar alone, no log of the error


def test_the_first_use_of_the_datasets_library_is_as_quiet_as_later_ones(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "one"}\n{"text": "cut')
    code = f"from sae.activations.text.documents import *; list(documents(TextConfig(dataset={str(tmp_path / 'data')!r}, streaming=True)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert "JSON parse error" in said
    assert "Failed to load" not in said  # the library's own log of it


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ModuleNotFoundError("No module named 'zstandard'", name="zstandard"), "it needs the package zstandard; install it"),
        (ConnectionError("Couldn't reach the Hub\nretried"), "Couldn't reach the Hub retried"),
        (OSError(), "OSError"),
    ],
)
def test_a_package_or_a_network_that_is_missing_is_one_sentence(monkeypatch, capfd, failure, reason):
    import datasets

    def rows(*_args, **_options):
        yield {"text": "a"}
        logging.getLogger("huggingface_hub.file_download").warning("Retrying in 8s [Retry 5/5].")
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", rows)
    found = documents(TextConfig(dataset="far/away"))
    assert next(found).content == "a"
    with pytest.raises(InputError, match=f"'far/away'.*datasets says: {reason}$"):
        next(found)
    assert capfd.readouterr().err == ""


def test_missing_input_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match=r"no \.txt"):
        read(tmp_path)
    with pytest.raises(InputError, match="neither"):
        read()
