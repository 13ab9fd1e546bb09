"""Explanations written by a model behind an OpenAI-compatible endpoint, scored by how well it then detects the feature in held-out text.

The model gets contexts of the training documents and writes one sentence; in new requests it gets that sentence and held-out contexts,
half of which have a token on which the feature fires, and predicts this for each. Prompts contain text of the index and nothing else.
"""

import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from typing_extensions import TypedDict

from sae.disk.arrays import ANSWERS
from sae.disk.places import writing
from sae.disk.reading import Count, Number, require
from sae.errors import InputError
from sae.features.explanations.lookups import FiringRows, ScannedText
from sae.features.index.reader import Context, FeatureIndex
from sae.progress import counted, progress
from sae.statistics import wilson_interval
from sae.text_input import replace_surrogates

if TYPE_CHECKING:
    from sae.features.explanations.explain import ExplainConfig
    from sae.features.explanations.explanation import Explanation

TOP, SAMPLED = 10, 10
"""Contexts to learn from: with the highest activations, and drawn from all on which it fires; of different documents."""
TESTED = 20
"""Held-out contexts asked about; on half of them the feature fires."""
PER_REQUEST = 10
BEFORE, AFTER = 20, 8
"""Tokens of a context around its central one."""
TRIES, TIMEOUT = 4, 120.0
WRITE = (
    "You study one feature of a language model. It is active on the tokens marked <<like this>> in the text excerpts below; the number "
    "before an excerpt is its highest activation there, 10 being the most ever seen. Excerpts under TOP are its strongest, those under "
    "SAMPLED are drawn at random from all on which it is active. Say in one short sentence on what kind of token or text it is active. "
    "Answer with that sentence alone."
)
DETECT = (
    "A feature of a language model is described as follows.\n\nDESCRIPTION: {text}\n\nFor each numbered excerpt below, say whether the "
    "feature is active on at least one of its tokens: 1 if it is, 0 if not. Answer with a JSON list of {n} numbers alone, such as [0, 1]."
)


class NoAnswer(Exception):
    """A failed request; the message is the kind of failure, for the count of failures."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Sends text and key only to the given URL."""

    def redirect_request(self, *_args: Any) -> None:
        return None


@dataclass
class Endpoint:
    """Chat completions of an OpenAI-compatible server."""

    base: str
    model: str
    key: str | None = None
    pause: float = 1.0
    """seconds before the second try; doubled before each further one"""
    requests: int = 0
    retries: int = 0
    failures: Counter = field(default_factory=Counter)
    broken: int = 0
    """answers with halves of surrogate pairs, which are U+FFFD now"""

    def __post_init__(self) -> None:
        address = urlsplit(self.base)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InputError(f"expected --endpoint to be a URL like http://127.0.0.1:8000/v1, got {self.base}")
        local = address.hostname in ("127.0.0.1", "localhost", "::1")
        proxies = [urllib.request.ProxyHandler({})] if local else []  # a proxy cannot reach this machine's own server
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def ask(self, instruction: str, content: str) -> str:
        """The answer's text. Raises `NoAnswer` if `TRIES` tries fail, `InputError` if key, URL or model is refused."""
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": content}]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 512}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.base.rstrip("/") + "/chat/completions", body, headers)
        kind = ""
        for attempt in range(TRIES):
            self.requests += 1
            wait = self.pause * 2**attempt
            try:
                with self._opener.open(request, timeout=TIMEOUT) as response:
                    text, halves = replace_surrogates(_content(response.read()))
                    self.broken += halves > 0
                    return text
            except urllib.error.HTTPError as error:
                said = ""
                with suppress(OSError, http.client.HTTPException):  # the connection may be lost in the middle of the reason
                    said = error.read(300).decode("utf-8", "replace")
                if error.code in (401, 403, 404):
                    raise InputError(f"{self.base} refuses the request ({error.code}: {said}); check URL, model name and key") from None
                kind = f"HTTP {error.code}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
                after = error.headers.get("Retry-After", "")
                wait = max(wait, min(float(after), 60.0)) if after.isdecimal() else wait
            except (OSError, http.client.HTTPException):
                kind = "no connection"
            except NoAnswer as error:
                kind = str(error)
                break
            if attempt + 1 < TRIES:
                self.retries += 1
                time.sleep(wait)
        self.failures[kind] += 1
        raise NoAnswer(kind)


def _content(body: bytes) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise NoAnswer("unparsable") from None
    if not isinstance(text, str) or not text.strip():
        raise NoAnswer("empty")
    text = re.sub(r"(?s)<think>.*?(</think>|$)", "", text).strip()  # thoughts, also those that the limit of tokens cut off
    if not text:
        raise NoAnswer("empty")
    return text


def explain_by_model(index: FeatureIndex, corpus: ScannedText, features: Sequence[int], config: "ExplainConfig") -> list["Explanation"]:
    """An explanation and its detection score for every feature that fires.

    Each feature's answer is appended to a log in the index's folder at once; a run that was stopped continues after the last whole line,
    and asks again only about features that failed. Raises `InputError` without a model name, or when the named variable holds no key.
    """
    if not config.judge_model:
        raise InputError("expected --judge-model with --endpoint: the name under which the server knows the model to ask")
    key = os.environ.get(config.key_variable) if config.key_variable else None
    if config.key_variable and not key:
        raise InputError(f"the environment variable {config.key_variable} holds no key; set it, or leave --key-variable out")
    endpoint = Endpoint(config.endpoint or "", config.judge_model, key)
    log = Log(index, config)
    missing = [j for j in features if not log.complete(j) and index.offsets[j + 1] > index.offsets[j]]
    requests = 1 + math.ceil(TESTED / PER_REQUEST)
    print(
        f"sends to {config.endpoint}, for each of {len(missing):,} features, up to {TOP + SAMPLED + TESTED} excerpts of "
        f"{BEFORE + AFTER + 1} tokens of the index's text in {requests} requests, and nothing else; "
        f"{len(features) - len(missing):,} features are done already or never fire"
    )
    failed: Counter = Counter()
    with progress("ask", len(missing), "features") as bar:
        for j in missing:
            try:
                log.add(explain_one(index, corpus, j, endpoint, config.seed))
            except NoAnswer as error:
                failed[str(error)] += 1
            bar.advance(1, requests=f"{endpoint.requests:,}", retries=f"{endpoint.retries:,}", failed=f"{endpoint.failures.total():,}")
    if failed:
        print("no explanation for " + ", ".join(f"{n:,} features ({kind})" for kind, n in failed.most_common()) + "; run again to retry")
    if endpoint.broken:
        print(f"{counted(endpoint.broken, 'answer')} held halves of surrogate pairs, which are no characters; they are now U+FFFD")
    found = [log.done[j] for j in features if j in log.done]
    unscored = sum(not log.complete(e.feature) for e in found)
    if unscored:
        print(f"{unscored:,} explanations are not completely scored, because requests failed; run again to repeat these requests")
    print(model_summary(found))
    return found


def explain_one(index: FeatureIndex, corpus: ScannedText, j: int, endpoint: Endpoint, seed: int) -> "Explanation":
    """Raises `NoAnswer` if no explanation arrives; a failed detection request is counted in the scores."""
    from sae.features.explanations.explanation import Explanation

    learn, held = corpus.firing(index, j)
    rng = np.random.default_rng((seed, j))
    top, sampled = learning_contexts(index, corpus, j, learn, rng)
    if not top:
        raise NoAnswer("never fires in the documents learned from")
    text = endpoint.ask(WRITE, examples_text(top, sampled))
    text = " ".join(re.sub(r"^\s*(explanation|answer)\s*:\s*", "", text, flags=re.IGNORECASE).split())[:1000]
    tested, truth = test_contexts(index, corpus, j, held, rng)
    if {c.document for c in tested} & {c.document for c in top + sampled}:
        raise AssertionError("a context to learn from and one to test on are of the same document")
    said: list[int | None] = []
    failures: Counter = Counter()
    for low in range(0, len(tested), PER_REQUEST):
        part = tested[low : low + PER_REQUEST]
        try:
            excerpts = "\n".join(f"{i}. {excerpt(context)}" for i, context in enumerate(part, 1))
            answers = parse_answers(endpoint.ask(DETECT.format(text=text, n=len(part)), excerpts), len(part))
        except NoAnswer as error:
            failures[str(error)] += 1
            answers = None
        else:
            failures["unparsable"] += answers is None
        said += answers or [None] * len(part)
    scores, baselines = detection_scores(truth, said)
    return Explanation(j, f"model:{endpoint.model}", text, scores | {"failed_requests": dict(+failures)}, baselines)


def learning_contexts(
    index: FeatureIndex, corpus: ScannedText, j: int, learn: FiringRows, rng: np.random.Generator
) -> tuple[list[Context], list[Context]]:
    """The strongest contexts of the documents to learn from, and a sample of the others; one per document."""
    documents: set[int] = set()

    def take(order: np.ndarray, n: int) -> list[Context]:
        taken: list[Context] = []
        for i in order:
            if len(taken) == n:
                break
            document = int(corpus.document_n[learn.rows[i]])
            if document not in documents:
                documents.add(document)
                taken.append(context_at(index, corpus, j, int(learn.rows[i])))
        return taken

    return take(np.argsort(-learn.values, kind="stable"), TOP), take(rng.permutation(len(learn.rows)), SAMPLED)


def test_contexts(
    index: FeatureIndex, corpus: ScannedText, j: int, held: FiringRows, rng: np.random.Generator
) -> tuple[list[Context], np.ndarray]:
    """Held-out contexts in random order and whether the feature fires in each: equally many of both, each around a random token."""
    firing = [context_at(index, corpus, j, int(row)) for row in rng.permutation(held.rows)[: TESTED // 2]]
    silent: list[Context] = []
    rows = np.flatnonzero(corpus.held_n)
    for row in rng.choice(rows, min(len(rows), 50 * TESTED), replace=False):
        if len(silent) == len(firing):
            break
        context = context_at(index, corpus, j, int(row))
        if not context.values.any():
            silent.append(context)
    firing = firing[: len(silent)]  # a feature that fires nearly everywhere
    order = rng.permutation(2 * len(silent))
    return [(firing + silent)[i] for i in order], np.repeat([True, False], len(silent))[order]


def context_at(index: FeatureIndex, corpus: ScannedText, j: int, row: int) -> Context:
    return index.context(index.feature(j), int(corpus.positions[row]), BEFORE, AFTER)


def excerpt(context: Context, marked: bool = False) -> str:
    """The excerpt on one line; with `marked`, tokens on which the feature fires are between << and >>."""
    parts = [f"<<{text}>>" if marked and value else text for text, value in zip(context.texts, context.values)]
    return "".join(parts).replace(">><<", "").replace("\n", "↵")


def examples_text(top: Sequence[Context], sampled: Sequence[Context]) -> str:
    strongest = max(float(abs(context.values).max()) for context in top)

    def lines(contexts: Sequence[Context]) -> str:
        return "\n".join(f"({10 * float(abs(c.values).max()) / max(strongest, 1e-30):.0f}) {excerpt(c, marked=True)}" for c in contexts)

    return f"TOP\n{lines(top)}\n\nSAMPLED\n{lines(sampled) or '(no others)'}"


def parse_answers(text: str, n: int) -> list[int | None] | None:
    """The last list of `n` zeros and ones in the answer; None if there is none."""
    for found in reversed(re.findall(r"\[[\s01,]*\]", text)):
        numbers = re.findall(r"[01]", found)
        if len(numbers) == n and re.fullmatch(r"\[\s*[01](\s*,\s*[01])*\s*,?\s*\]", found):
            return [int(number) for number in numbers]
    return None


def detection_scores(truth: np.ndarray, said: Sequence[int | None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of the answers that arrived, and of the baselines always no and always yes on the same contexts; None if no answer arrived."""
    answered = np.array([answer is not None for answer in said], bool)
    actual, yes = truth[answered], np.array([answer == 1 for answer in said if answer is not None], bool)
    scores = _accuracy(actual, yes)
    n = len(actual)
    if n:
        scores["accuracy_interval"] = [round(end, 4) for end in wilson_interval(int((actual == yes).sum()), n)]
    baselines = {"always_no": _accuracy(actual, np.zeros(n, bool)), "always_yes": _accuracy(actual, np.ones(n, bool))}
    return scores | {"contexts": len(said), "answered": n}, baselines


def _accuracy(actual: np.ndarray, yes: np.ndarray) -> dict[str, Any]:
    if not len(actual):
        return {"accuracy": None, "f1": None}
    either = int(actual.sum() + yes.sum())
    return {
        "accuracy": round(float((actual == yes).mean()), 4),
        "f1": round(2 * int((actual & yes).sum()) / either, 4) if either else None,
    }


class Accuracy(TypedDict):
    accuracy: Number | None


class Scores(Accuracy):
    contexts: Count
    answered: Count
    failed_requests: dict[str, Count]


class Log:
    """Answers so far, one line each, in their own file for every model, text and division of its documents.

    The file outlives the index (see `fresh_folder`) and is used again when one of the same text stands there.
    """

    def __init__(self, index: FeatureIndex, config: "ExplainConfig"):
        from sae.features.explanations.explanation import Explanation, parse_explanation

        self.done: dict[int, Explanation] = {}
        name = re.sub(r"[^\w.-]", "_", config.judge_model or "")
        text = [zlib.crc32(np.ascontiguousarray(index.tokens[part]).data) for part in ("ids", "sequence_document", "scanned")]
        settings = json.dumps([index.info["dictionary_crc32"], text, config.held_out, config.seed, config.judge_model])
        self.path = config.index / ANSWERS.replace("*", f"{name}.{zlib.crc32(settings.encode()):08x}")
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []  # what follows the last break was cut off by a kill
        for number, line in enumerate(lines, 1):
            what = f"a model's answer in line {number} of {self.path} (remove the line to ask again)"
            explanation = parse_explanation(line, what)
            require(explanation.scores, Scores, what)
            require(explanation.baselines, dict[Literal["always_no", "always_yes"], Accuracy], what)
            self.done[explanation.feature] = explanation
        if self.path.exists():
            os.truncate(self.path, sum(len(line) + 1 for line in lines))

    def complete(self, j: int) -> bool:
        """Whether nothing is left to request for the feature: a nonsensical answer counts, a failed request does not."""
        return j in self.done and set(self.done[j].scores["failed_requests"]) <= {"unparsable", "empty"}

    def add(self, explanation: "Explanation") -> None:
        """Appends and flushes to the disk: the answer was paid for."""
        with writing(self.path), open(self.path, "ab") as file:
            file.write(json.dumps(explanation._asdict(), ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[explanation.feature] = explanation


def model_summary(explanations: Sequence["Explanation"]) -> str:
    scored = [e for e in explanations if e.scores["accuracy"] is not None]
    lost = sum(e.scores["contexts"] - e.scores["answered"] for e in explanations)
    if not scored:
        return f"no detection score: {lost:,} contexts without an answer"
    accuracy = [e.scores["accuracy"] for e in scored]
    yes = [e.baselines["always_yes"]["accuracy"] for e in scored]
    no = [e.baselines["always_no"]["accuracy"] for e in scored]
    return (
        f"detection accuracy {np.mean(accuracy):.3f} over {len(scored):,} features (always yes {np.mean(yes):.3f}, always no "
        f"{np.mean(no):.3f}); {lost:,} contexts without an answer"
    )
