"""Labels of others: read from Neuronpedia's files, scored by their words against a plain loop over the text."""

import gzip
import itertools
import json
import re
import shutil

import numpy as np
import pytest

from sae.errors import InputError
from sae.features.explanations.explain import ExplainConfig, explain
from sae.features.explanations.explanation import read_explanations
from sae.features.explanations.labels import label_words, labels_summary, read_labels
from sae.features.explanations.lookups import read_scanned_text
from sae.features.index.words import all_words


def row(feature, text, **more):
    return {"modelId": "m", "layer": "0-res-x", "index": str(feature), "description": text} | more


def write_labels(folder, *rows):
    path = folder / "explanations" / "batch-0.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in rows).encode()))
    return folder


@pytest.fixture
def folder(world, tmp_path):
    return shutil.copytree(world.index.folder, tmp_path / "index")


def tokens_of(index, wanted) -> np.ndarray:
    """bool over the corpus: tokens that hold a byte of one of the words. Byte by byte, sequence by sequence."""
    ids, starts = np.asarray(index.tokens["ids"]), [*np.asarray(index.tokens["sequence_starts"]).tolist(), None]
    hit = np.zeros(len(ids), bool)
    for start, stop in itertools.pairwise(starts):
        owner, data = [], b""
        for n, token in enumerate(ids[start:stop].tolist(), start):
            piece = b"\n" if index.vocabulary.special[token] else index.vocabulary.pieces[token]
            data, owner = data + piece, owner + [n] * len(piece)
        text = data.decode("utf-8", "surrogateescape")
        for match in re.finditer(r"\w+(?:'\w+)*", text):
            if match.group().lower() in wanted:
                low = len(text[: match.start()].encode("utf-8", "surrogateescape"))
                high = len(text[: match.end()].encode("utf-8", "surrogateescape"))
                hit[owner[low:high]] = True
    return hit


def test_every_word_is_found_with_all_of_its_tokens(world):
    index = world.index
    found = all_words(index.tokens["ids"], index.tokens["sequence_starts"], index.vocabulary)
    assert {"zebrafly", "zebrafly's", "zebraflyers", "zebrafly_x", "привет", "漢字", "café", "it's"} <= set(found)
    assert "ZEBRAFLY" not in found
    for word in ("zebrafly", "привет", "it's", "low", "done"):
        assert found[word].tolist() == np.flatnonzero(tokens_of(index, {word})).tolist()


def test_scores_are_those_of_the_words(world, folder, tmp_path, capsys):
    from sklearn.metrics import f1_score, precision_score, recall_score

    alive = np.flatnonzero(world.index.columns["count"])[:3].tolist()
    texts = ["words about zebraflyers and the quoted", "hums, low", "привет or done"]
    labels = write_labels(tmp_path / "export", *map(row, alive, texts))
    explain(ExplainConfig(index=folder, labels=labels))
    found = read_explanations(folder)
    corpus = read_scanned_text(world.index, 0.3, 0)
    h = corpus.held_n
    forms = [  # with the plural and the singular of each
        {"zebraflyers", "zebraflyer", "zebraflyerss", "quoted", "quoteds"},
        {"hums", "hum", "humss", "low", "lows"},
        {"привет", "done"},
    ]
    assert [label_words(text) for text in texts] == [["zebraflyers", "quoted"], ["hums", "low"], ["привет", "done"]]
    for j, text, words in zip(alive, texts, forms):
        (label,) = found[j]
        fires = tokens_of(world.index, words | {f"{w}s" for w in words})[corpus.positions]
        truth = np.zeros(len(h), bool)
        truth[corpus.row_of[world.index.feature(j).positions]] = True
        assert label.text == text
        for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
            assert label.scores[name] == pytest.approx(score(truth[h], fires[h], zero_division=0), abs=6e-5)
        assert set(label.baselines) == {"always", "random", "token", "shuffled"}
    said = capsys.readouterr().out
    assert "3 labels of m/0-res-x, for 3 features" in said
    assert "by the labels' words" in said


def test_labels_stand_beside_our_own_and_keep_type_model_and_author(world, folder, tmp_path):
    j = int(np.flatnonzero(world.index.columns["count"])[0])
    explain(ExplainConfig(index=folder, features=(j,)))
    facts = {"typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini", "authorId": "cl1"}
    labels = write_labels(tmp_path, row(j, "low\n  sounds", **facts), row(j, "zebras", **facts), row(j, "end"))
    explain(ExplainConfig(index=folder, labels=labels / "explanations" / "batch-0.jsonl.gz"))
    found = {e.method: e.text for e in read_explanations(folder)[j]}
    assert set(found) >= {"token", "bigram", "pattern"}
    named = "neuronpedia: oai_token-act-pair, gpt-4o-mini, cl1"
    assert found[named] == "low sounds"
    assert found[f"{named} #2"] == "zebras"
    assert found["neuronpedia"] == "end"


def test_labels_no_better_than_others_are_called_so(world, folder, tmp_path, capsys):
    alive = np.flatnonzero(world.index.columns["count"])[:3].tolist()
    explain(ExplainConfig(index=folder, labels=write_labels(tmp_path, *(row(j, "xylophones") for j in alive))))
    assert "they may belong to another dictionary" in capsys.readouterr().out
    assert "nothing is scored" in labels_summary([])


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "found none"),
        ([row(10**6, "x")], "the index's own, got one of 1000000"),
        ([row("one", "x")], "the index's own, got one of one"),
        ([{"modelId": "m", "layer": "0-res-x", "index": "1"}], "a row in line 1"),
    ],
)
def test_unusable_labels(tmp_path, rows, sentence):
    with pytest.raises(InputError, match=sentence):
        read_labels(write_labels(tmp_path, *rows), 100)


def test_labels_go_alone(folder, tmp_path):
    with pytest.raises(InputError, match="--labels alone or with --features"):
        explain(ExplainConfig(index=folder, labels=tmp_path, sample=3))
