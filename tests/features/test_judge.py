"""Explanations by a model, against a real server on this machine that speaks the protocol with scripted answers."""

import dataclasses
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from letters import PIECES, by_rules, token_c

from sae.errors import InputError
from sae.features.explanations.explain import ExplainConfig, explain
from sae.features.explanations.explanation import read_explanations
from sae.features.explanations.judge import (
    Endpoint,
    Log,
    NoAnswer,
    _content,
    detection_scores,
    explain_by_model,
    explain_one,
    parse_answers,
)
from sae.features.explanations.lookups import read_scanned_text
from sae.features.index.build import IndexConfig, build_index


class Server:
    """Answers with `script(instruction, content, number of the request)`: a text, or (status, body, headers)."""

    def __init__(self):
        self.script = oracle
        self.seen: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append({"path": self.path, "headers": dict(self.headers), "body": body})
                system, user = (message["content"] for message in body["messages"])
                answer = outer.script(system, user, len(outer.seen))
                status, text, headers = answer if isinstance(answer, tuple) else (200, completion(answer), {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def excerpts(content):
    return re.findall(r"(?m)^\d+\. (.*)$", content)


def oracle(system, content, _number):
    """Knows that the feature fires on the letter c."""
    if "DESCRIPTION" not in system:
        return "Explanation: the letter c"
    assert re.search("DESCRIPTION: the letter c( \ufffd)?\n", system)
    return json.dumps([int("c" in re.sub("<s>", "", excerpt)) for excerpt in excerpts(content)])


@pytest.fixture
def server():
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


RARE_C = np.where(np.random.default_rng(5).random((90, 80)) < 0.03, 3, np.random.default_rng(6).choice([1, 2, 4, 5, 6], (90, 80)))


@pytest.fixture(scope="module")
def index():
    """Four features that fire on c, which is rare, and one that never fires."""
    return by_rules([[0, *row] for row in RARE_C.tolist()], [token_c] * 4 + [lambda _ids, _i: 0.0])


@pytest.fixture(scope="module")
def corpus(index):
    return read_scanned_text(index, 0.3, 0)


def config(server, tmp_path, **flags):
    return ExplainConfig(index=tmp_path, endpoint=server.url, judge_model="scripted", **flags)


def test_a_model_that_knows_scores_one_and_its_text_is_kept(server, index, corpus, tmp_path, capsys):
    found = explain_by_model(index, corpus, range(5), config(server, tmp_path))
    assert [e.feature for e in found] == [0, 1, 2, 3]
    for e in found:
        assert (e.method, e.text) == ("model:scripted", "the letter c")
        assert (e.scores["accuracy"], e.scores["f1"], e.scores["contexts"], e.scores["answered"]) == (1, 1, 20, 20)
        assert e.scores["failed_requests"] == {}
        assert e.baselines == {"always_no": {"accuracy": 0.5, "f1": 0.0}, "always_yes": {"accuracy": 0.5, "f1": 0.6667}}
    assert len(server.seen) == 4 * 3
    assert all(request["path"] == "/v1/chat/completions" for request in server.seen)
    assert not any("Authorization" in request["headers"] for request in server.seen)
    told = capsys.readouterr().out
    assert f"sends to {server.url}, for each of 4 features, up to 40 excerpts of 29 tokens" in told
    assert "detection accuracy 1.000 over 4 features (always yes 0.500, always no 0.500)" in told


def test_contexts_to_learn_from_and_to_test_on_are_of_different_documents(server, index, corpus):
    explain_one(index, corpus, 0, Endpoint(server.url, "m"), 0)
    held = set(corpus.document_n[corpus.held_n].tolist())
    documents = ["<s>" + b"".join(PIECES[t] for t in row).decode() for row in RARE_C.tolist()]  # random: an excerpt is in one only

    def of(excerpt):
        return [d for d, text in enumerate(documents) if excerpt in text]

    write, *detect = [request["body"]["messages"][1]["content"] for request in server.seen]
    learned = [re.sub("<<|>>", "", e) for e in re.findall(r"(?m)^\(\d+\) (.*)$", write)]
    tested = [e for content in detect for e in excerpts(content)]
    assert len(learned) == len({d for e in learned for d in of(e)}) == 20
    assert len(tested) == 20
    assert all(len(of(e)) == 1 and of(e)[0] not in held for e in learned)
    assert all(len(of(e)) == 1 and of(e)[0] in held for e in tested)
    assert "<<c>>" in write
    assert "<<" not in "".join(detect)
    firing = ["c" in e for e in tested]
    assert sum(firing) == 10
    assert firing != sorted(firing)
    assert firing != sorted(firing, reverse=True)


@pytest.mark.parametrize(("answer", "f1"), [(1, 0.6667), (0, 0.0)])
def test_one_answer_for_all_scores_as_its_baseline(server, index, corpus, answer, f1):
    server.script = lambda system, content, n: json.dumps([answer] * len(excerpts(content))) if "DESCRIPTION" in system else "c"
    scores = explain_one(index, corpus, 0, Endpoint(server.url, "m"), 0).scores
    assert (scores["accuracy"], scores["f1"]) == (0.5, f1)
    low, high = scores["accuracy_interval"]
    assert low < 0.5 < high


def test_unparsable_answers_are_counted_and_not_scored(server, index, corpus):
    server.script = lambda system, content, n: oracle(system, content, n) if n < 3 else "I would rather not."
    scores = explain_one(index, corpus, 0, Endpoint(server.url, "m"), 0).scores
    assert scores["failed_requests"] == {"unparsable": 1}
    assert (scores["contexts"], scores["answered"], scores["accuracy"]) == (20, 10, 1)
    server.script = lambda system, content, n: "no" if "DESCRIPTION" in system else "c"
    explanation = explain_one(index, corpus, 0, Endpoint(server.url, "m"), 0)
    assert (explanation.scores["accuracy"], explanation.scores["answered"]) == (None, 0)
    assert explanation.scores["failed_requests"] == {"unparsable": 2}


def test_passing_errors_are_tried_again_with_growing_pauses(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.script = lambda _s, _c, n: (503 if n == 1 else 429, "", {}) if n < 3 else "at last"
    endpoint = Endpoint(server.url, "m", pause=0.5)
    assert endpoint.ask("a", "b") == "at last"
    assert (endpoint.requests, endpoint.retries, pauses) == (3, 2, [0.5, 1.0])
    server.script = lambda _s, _c, n: (500, "", {"Retry-After": "7"})
    with pytest.raises(NoAnswer, match="HTTP 500"):
        endpoint.ask("a", "b")
    assert (endpoint.requests, pauses[2:]) == (7, [7, 7, 7])
    assert endpoint.failures == {"HTTP 500": 1}


def test_no_server_and_nonsense_are_no_answers(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _s: None)
    for body, kind in [
        ("<html>", "unparsable"),
        ('{"choices": []}', "unparsable"),
        (completion("  "), "empty"),
        (completion(None), "empty"),
    ]:
        server.script = lambda _s, _c, n, body=body: (200, body, {})
        with pytest.raises(NoAnswer, match=kind):
            Endpoint(server.url, "m").ask("a", "b")
    with pytest.raises(NoAnswer, match="no connection"):
        Endpoint("http://127.0.0.1:1/v1", "m").ask("a", "b")


def test_refused_key_or_model_ends_the_run_with_a_sentence(server):
    server.script = lambda _s, _c, n: (404, '{"error": "no such model"}', {})
    with pytest.raises(InputError, match=r"404.*no such model.*check URL, model name and key"):
        Endpoint(server.url, "m").ask("a", "b")
    assert len(server.seen) == 1


def test_half_a_character_in_an_answer_is_replaced_and_counted(server, index, corpus, tmp_path, capsys):
    server.script = lambda system, content, n: oracle(system, content, n) if "DESCRIPTION" in system else "the letter c \ud83d"
    asked = config(server, tmp_path)
    found = explain_by_model(index, corpus, [0], asked)
    assert found[0].text == "the letter c \ufffd"
    assert "1 answer held halves of surrogate pairs" in capsys.readouterr().out
    assert explain_by_model(index, corpus, [0], asked) == found  # as it stands in the log


@pytest.mark.parametrize("answer", ["<think>x</think>", "<think> cut off at the limit of", "  "])
def test_thoughts_alone_are_no_answer(server, answer):
    server.script = lambda *_: answer
    endpoint = Endpoint(server.url, "m")
    with pytest.raises(NoAnswer, match="empty"):
        endpoint.ask("", "")
    assert endpoint.failures == {"empty": 1}
    server.script = lambda *_: "<think>well</think> the letter c"
    assert endpoint.ask("", "") == "the letter c"


def test_nothing_follows_a_redirect(server):
    other = Server()
    server.script = lambda _s, _c, n: (302, "", {"Location": other.url + "/chat/completions"})
    with pytest.raises(NoAnswer, match="HTTP 302"):
        Endpoint(server.url, "m", key="secret").ask("a", "b")
    other.server.shutdown()
    other.server.server_close()
    assert not other.seen


def test_key_comes_from_the_environment(server, index, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    found = explain_by_model(index, corpus, [0], config(server, tmp_path, key_variable="SOME_KEY"))
    assert {request["headers"]["Authorization"] for request in server.seen} == {"Bearer s3cret"}
    assert all("s3cret" not in path.read_text() for path in tmp_path.iterdir())
    assert found[0].scores["accuracy"] == 1


def test_a_stopped_run_goes_on_and_ends_as_an_uninterrupted_one(server, index, corpus, tmp_path):
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    whole = explain_by_model(index, corpus, range(4), config(server, tmp_path / "whole"))
    settings = config(server, tmp_path / "part")
    server.seen.clear()
    server.script = lambda system, content, n: (401, "", {}) if n > 7 else oracle(system, content, n)
    with pytest.raises(InputError, match="401"):
        explain_by_model(index, corpus, range(4), settings)
    log = Log(index, settings)
    assert sorted(log.done) == [0, 1]
    with open(log.path, "ab") as file:
        file.write(b'{"feature": 2, "method": "mod')  # as a kill in the middle of a write leaves it
    server.seen.clear()
    server.script = oracle
    assert explain_by_model(index, corpus, range(4), settings) == whole
    assert len(server.seen) == 2 * 3
    assert len(log.path.read_text().splitlines()) == 4


def test_answers_outlive_a_rebuild_and_serve_the_same_text_only(server, world, tmp_path, capsys):
    server.script = lambda system, content, _number: str([1] * len(excerpts(content))) if "DESCRIPTION" in system else "something"
    build = IndexConfig(cache=world.cache, dictionary=world.dictionary_folder, out=tmp_path / "index", device="cpu")
    ask = config(server, build_index(build), features=(4, 17))
    first = explain(ask).read_bytes()
    asked = len(server.seen)
    assert asked
    build_index(build)
    assert "the explanations of the older index went with it" in capsys.readouterr().out
    assert read_explanations(build.out) == {}
    assert explain(ask).read_bytes() == first
    assert len(server.seen) == asked
    build_index(dataclasses.replace(build, tokens=2000))  # answers on other text prove nothing here
    explain(ask)
    assert len(server.seen) == 2 * asked
    assert len(list(build.out.glob("answers.*.jsonl"))) == 2


def test_features_without_an_answer_are_told_and_asked_again(server, index, corpus, tmp_path, capsys):
    server.script = lambda system, content, n: (400, "", {}) if n == 1 else oracle(system, content, n)
    found = explain_by_model(index, corpus, range(3), config(server, tmp_path))
    assert [e.feature for e in found] == [1, 2]
    assert "no explanation for 1 features (HTTP 400)" in capsys.readouterr().out
    assert [e.feature for e in explain_by_model(index, corpus, range(3), config(server, tmp_path))] == [0, 1, 2]


def test_scores_that_failed_on_the_way_are_asked_for_again_and_nonsense_is_not(server, index, corpus, tmp_path, capsys):
    lost = lambda system, content, n: (400, "", {}) if "DESCRIPTION" in system and n < 4 else oracle(system, content, n)  # noqa: E731
    server.script = lost
    first = explain_by_model(index, corpus, range(2), config(server, tmp_path))
    assert [e.scores["answered"] for e in first] == [0, 20]
    assert "1 explanations are not completely scored" in capsys.readouterr().out
    server.script = oracle
    again = explain_by_model(index, corpus, range(2), config(server, tmp_path))
    assert [e.scores["answered"] for e in again] == [20, 20]
    assert len(server.seen) == 3 * 3
    server.script = lambda system, content, n: "no list" if "DESCRIPTION" in system else oracle(system, content, n)
    explain_by_model(index, corpus, range(3), config(server, tmp_path))
    asked = len(server.seen)
    explain_by_model(index, corpus, range(3), config(server, tmp_path))
    assert len(server.seen) == asked


@pytest.mark.parametrize(
    ("text", "n", "answers"),
    [
        ("[1, 0, 1]", 3, [1, 0, 1]),
        ("Here it is:\n```json\n[0,1]\n```", 2, [0, 1]),
        ("[1, 1] or rather [0, 1]", 2, [0, 1]),
        ("[1, 0]", 3, None),
        ("[10, 1]", 2, None),
        ("1, 0", 2, None),
        ("", 1, None),
    ],
)
def test_answers_are_read_from_their_list(text, n, answers):
    assert parse_answers(text, n) == answers


def test_detection_without_any_answer_is_none():
    scores, baselines = detection_scores(np.array([True, False]), [None, None])
    assert (scores["accuracy"], scores["answered"]) == (None, 0)
    assert baselines["always_yes"]["accuracy"] is None


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"choices": [{"message": {"content": ' + b"1" * 5000 + b"}}]}", b"\xff", b'{"choices": null}']
)
def test_what_is_no_answer_is_counted_as_unparsable(body):
    with pytest.raises(NoAnswer, match="unparsable"):
        _content(body)
