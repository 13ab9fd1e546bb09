"""Scores of explanations against dense arithmetic, and the file they stand in."""

import json
import shutil
import socket

import numpy as np
import pytest
from letters import RULES, by_rules, texts

from sae.errors import InputError
from sae.features.explanations.explain import ExplainConfig, PredictionScorer, explain, explain_by_lookup
from sae.features.explanations.explanation import Explanation, read_explanations, write_explanations
from sae.features.explanations.lookups import FiringRows, Prediction, read_scanned_text


@pytest.fixture(scope="module")
def index():
    return by_rules(texts())


@pytest.fixture
def folder(world, tmp_path):
    return shutil.copytree(world.index.folder, tmp_path / "index")


def dense_case(corpus, seed):
    """A random sparse truth and prediction over the held-out rows, as arrays over all rows and as the scorer takes them."""
    rng = np.random.default_rng(seed)
    held = np.flatnonzero(corpus.held_n)
    truth, guess, fires = np.zeros(len(corpus.held_n)), np.zeros(len(corpus.held_n)), np.zeros(len(corpus.held_n), bool)
    truth[held] = rng.exponential(size=len(held)) * (rng.random(len(held)) < 0.2)
    guess[held] = np.where(rng.random(len(held)) < 0.7, truth[held], rng.exponential(size=len(held)) * (rng.random(len(held)) < 0.3))
    fires[held] = (guess[held] > 0) & (rng.random(len(held)) < 0.8)
    rows, firing = np.flatnonzero(guess), np.flatnonzero(truth)
    return truth, guess, fires, FiringRows(firing, truth[firing]), Prediction(rows, guess[rows], fires[rows])


def by_definition(truth, guess, fires):
    from sklearn.metrics import f1_score, precision_score, recall_score

    firing = truth > 0
    scores = [f1_score(firing, fires), precision_score(firing, fires), recall_score(firing, fires), np.corrcoef(truth, guess)[0, 1]]
    return dict(zip(["f1", "precision", "recall", "correlation"], scores))


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_the_definitions_over_all_held_out_tokens(index, seed):
    corpus = read_scanned_text(index, 0.3, 0)
    truth, guess, fires, held, prediction = dense_case(corpus, seed)
    scores = PredictionScorer(corpus, 0).score(held, prediction)
    h = corpus.held_n
    for name, value in by_definition(truth[h], guess[h], fires[h]).items():
        assert scores[name] == pytest.approx(value, abs=6e-5)
    assert scores["tokens"] == h.sum()
    assert scores["firing_tokens"] == (truth > 0).sum()
    for name in ("f1", "correlation"):
        low, high = scores[f"{name}_interval"]
        assert low <= scores[name] <= high


def test_interval_equals_drawing_whole_documents(index):
    corpus = read_scanned_text(index, 0.3, 0)
    truth, guess, fires, held, prediction = dense_case(corpus, 7)
    scorer = PredictionScorer(corpus, 0, draws=30)
    scores = scorer.score(held, prediction)
    documents = np.unique(corpus.document_n[corpus.held_n])
    drawn = []
    for weights in scorer.draws_rd.astype(int):
        rows = np.concatenate([np.flatnonzero(corpus.document_n == d) for d in np.repeat(documents, weights)])
        drawn.append(by_definition(truth[rows], guess[rows], fires[rows]))
    for name in ("f1", "correlation"):
        assert scores[f"{name}_interval"] == pytest.approx(np.percentile([d[name] for d in drawn], [2.5, 97.5]), abs=6e-5)


def test_scores_that_are_not_defined_are_none(index):
    corpus = read_scanned_text(index, 0.3, 0)
    rows = np.flatnonzero(corpus.held_n)[:3]
    none, some = FiringRows(np.zeros(0, int), np.zeros(0)), FiringRows(rows, np.ones(3))
    silent, loud = Prediction(*none, np.zeros(0, bool)), Prediction(rows, np.ones(3), np.ones(3, bool))
    scorer = PredictionScorer(corpus, 0)
    assert (scorer.score(none, silent)["f1"], scorer.score(none, silent)["precision"]) == (None, None)
    assert (scorer.score(none, loud)["f1"], scorer.score(none, loud)["precision"]) == (None, 0)
    assert (scorer.score(some, silent)["f1"], scorer.score(some, silent)["recall"]) == (0, 0)
    assert scorer.score(some, silent)["correlation"] is None
    assert scorer.score(some, loud)["f1"] == scorer.score(some, loud)["correlation"] == 1


def test_a_prediction_on_a_learned_document_is_refused(index):
    corpus = read_scanned_text(index, 0.3, 0)
    row = np.flatnonzero(~corpus.held_n)[:1]
    with pytest.raises(AssertionError, match="learned from"):
        PredictionScorer(corpus, 0).score(FiringRows(row, np.ones(1)), Prediction(row, np.ones(1), np.ones(1, bool)))


def test_known_rules_score_as_they_must_beside_their_baselines(index):
    found = {(e.feature, e.method): e for e in explain_by_lookup(index, read_scanned_text(index, 0.3, 0), range(len(RULES)), 0)}
    names = [rule.__name__ for rule in RULES]

    def f1(rule, method):
        return found[names.index(rule), method].scores["f1"]

    assert [f1("token_c", method) for method in ("token", "bigram", "pattern")] == [1, 1, 1]
    for rule in ("a_star_c", "after_a", "first"):
        assert f1(rule, "pattern") == 1
        assert f1(rule, "token") < 0.6
    assert f1("after_a", "bigram") == 1
    assert f1("never", "pattern") is None
    assert found[names.index("never"), "pattern"].text == "never fires in the documents learned from"
    c = found[names.index("token_c"), "pattern"]
    density = c.scores["firing_tokens"] / c.scores["tokens"]
    assert c.baselines["always"] == {
        "f1": pytest.approx(2 * density / (1 + density), abs=1e-4),
        "precision": pytest.approx(density, abs=1e-4),
        "recall": 1,
    }
    assert c.baselines["random"]["f1"] == pytest.approx(density, abs=0.03)
    assert c.baselines["token"]["f1"] == 1
    assert c.baselines["shuffled"]["f1"] < 0.7
    assert set(found[names.index("token_c"), "token"].baselines) == {"always", "random", "shuffled"}


def test_random_baseline_is_the_mean_of_drawn_ones(index):
    corpus = read_scanned_text(index, 0.3, 0)
    found = explain_by_lookup(index, corpus, [0], 0)[0]
    learn, held = corpus.firing(index, 0)
    rate, rows = len(learn.rows) / (~corpus.held_n).sum(), np.flatnonzero(corpus.held_n)
    truth = np.isin(rows, held.rows)
    rng = np.random.default_rng(0)
    drawn = [by_definition(truth.astype(float), truth.astype(float), rng.random(len(rows)) < rate)["f1"] for _ in range(300)]
    assert found.baselines["random"]["f1"] == pytest.approx(np.mean(drawn), abs=0.01)


def test_command_explains_every_feature_without_a_connection(folder, monkeypatch):
    def refuse(*_args):
        raise AssertionError("nothing may be sent without --endpoint")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    explain(ExplainConfig(index=folder))
    found = read_explanations(folder)
    assert sorted(found) == list(range(40))
    assert all([e.method for e in some] == ["token", "bigram", "pattern"] for some in found.values())
    assert found[3][0].scores["firing_tokens"] == 0
    for j in set(range(40)) - {3}:  # features of this world fire by their token alone, one of them on every token
        token = found[j][0]
        assert token.scores["f1"] > 0.9, token
        assert (token.scores["correlation"] or 0) > 0.9 if j != 4 else token.scores["correlation"] is None


def test_a_part_is_explained_as_in_the_whole_and_leaves_the_rest(folder):
    explain(ExplainConfig(index=folder))
    whole = (folder / "explanations.jsonl").read_bytes()
    explain(ExplainConfig(index=folder, features=(7, 5)))
    assert (folder / "explanations.jsonl").read_bytes() == whole
    (folder / "explanations.jsonl").unlink()
    explain(ExplainConfig(index=folder, features=(7, 5)))
    assert (folder / "explanations.jsonl").read_text().splitlines() == [
        line for line in whole.decode().splitlines() if json.loads(line)["feature"] in (5, 7)
    ]


def test_file_is_whole_or_as_it_was(tmp_path):
    assert read_explanations(tmp_path) == {}
    good = Explanation(4, "token", "fires on \"<b>&\u2028 'x'\"", {"f1": 0.5}, {})
    write_explanations(tmp_path, [good])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_explanations(tmp_path, [good._replace(feature=1), good._replace(feature=2, scores={"f1": float("nan")})])
    assert read_explanations(tmp_path) == {4: [good]}
    assert [p.name for p in tmp_path.iterdir()] == ["explanations.jsonl"]
    write_explanations(tmp_path, [good._replace(text="other"), good._replace(method="model:m")])
    assert [e.text for e in read_explanations(tmp_path)[4]] == ["other", good.text]


def test_half_a_character_is_refused_and_a_byte_order_mark_is_none(tmp_path):
    good = Explanation(4, "token", "x", {}, {})._asdict()
    path = tmp_path / "explanations.jsonl"
    path.write_text(f"\ufeff{json.dumps(good)}\n")
    assert read_explanations(tmp_path) == {4: [Explanation(**good)]}
    for bad in (good | {"text": "half a \ud83d"}, good | {"method": "model:\udc00"}):
        path.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
        with pytest.raises(InputError, match=r"line 2 .* half of a surrogate pair"):
            read_explanations(tmp_path)


@pytest.mark.parametrize("line", ["{", '{"feature": 1}', "[1, 2]", "7"])
def test_damaged_file_is_told_with_its_line(tmp_path, line):
    write_explanations(tmp_path, [Explanation(4, "token", "x", {}, {})])
    with open(tmp_path / "explanations.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"expected an explanation in line 2 of"):
        read_explanations(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"features": (1,), "sample": 2}, "got both"),
        ({"features": (40,)}, "feature 40 does not exist"),
        ({"sample": 41}, "between 1 and 39"),
        ({"judge_model": "m"}, "belong to --endpoint"),
        ({"endpoint": "http://127.0.0.1:1/v1"}, "expected --judge-model"),
        ({"endpoint": "ftp://x", "judge_model": "m"}, "expected --endpoint to be a URL"),
        ({"endpoint": "http://127.0.0.1:1/v1", "judge_model": "m", "key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY holds no key"),
        ({"held_out": 0.0}, "between 0 and 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(folder, flags, message):
    with pytest.raises(InputError, match=message):
        explain(ExplainConfig(index=folder, **flags))
    assert not (folder / "explanations.jsonl").exists()
