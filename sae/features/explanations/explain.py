"""Explanations of features, and how well each predicts the feature's activations on documents that it was not learned from.

Token look-up, bigram look-up and patterns (lookups.py) need neither model nor network. A model behind an OpenAI-compatible endpoint can
write explanations too (judge.py); nothing is sent without `--endpoint`. All are in `explanations.jsonl` in the index's folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae.disk.arrays import EXPLANATIONS
from sae.disk.places import require_file
from sae.disk.writing import only_writer
from sae.errors import InputError
from sae.features.explanations.explanation import METHODS, Explanation, write_explanations
from sae.features.explanations.labels import labels_summary, read_labels, score_labels
from sae.features.explanations.lookups import (
    Explained,
    FiringRows,
    ScannedText,
    bigram_lookup,
    pattern_lookup,
    read_scanned_text,
    rules_text,
    token_lookup,
)
from sae.features.explanations.scores import PredictionScorer, point, trivial
from sae.features.index.reader import FeatureIndex
from sae.progress import progress

LOOKUPS: dict[str, Callable[[ScannedText, FiringRows], Explained]] = dict(
    zip(METHODS, (token_lookup, bigram_lookup, pattern_lookup), strict=True)
)


@dataclass(kw_only=True)
class ExplainConfig:
    index: Path
    """Folder that `sae index` wrote; explanations.jsonl is written into it."""
    features: tuple[int, ...] = ()
    """Features to explain. Default: all."""
    labels: Path | None = None
    """Score these labels instead: folder of Neuronpedia's export of the dictionary, its explanations/ folder, or one of their files."""
    sample: int | None = None
    """Explain this many features, drawn at random from those that fire."""
    held_out: float = 0.3
    """Share of the documents held out for testing."""
    seed: int = 0
    """Seed of the held-out documents and of all other sampling."""
    endpoint: str | None = None
    """Let a model write explanations: base URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1."""
    judge_model: str | None = None
    """Name of the model at the endpoint."""
    key_variable: str | None = None
    """Environment variable that holds the endpoint's key. Default: no key is sent."""


def explain(config: ExplainConfig) -> Path:
    """Explains features and writes explanations.jsonl, keeping lines of other features and methods. Returns its path.

    Raises `InputError` for a feature that does not exist, or flags that do not go together.
    """
    if config.features and config.sample is not None:
        raise InputError("expected --features or --sample, but got both")
    if config.endpoint is None and (config.judge_model is not None or config.key_variable is not None):
        raise InputError("--judge-model and --key-variable belong to --endpoint, which was not given; add it or leave them out")
    if config.labels is not None and (config.endpoint is not None or config.sample is not None):
        raise InputError("expected --labels alone or with --features, got --endpoint or --sample too; leave that out")
    index = FeatureIndex.open(config.index, verify=True)
    require_file(config.index / EXPLANATIONS)
    features = choose(index, config)
    labels = read_labels(config.labels, index.d_sae) if config.labels else None
    corpus = read_scanned_text(index, config.held_out, config.seed)
    with only_writer(config.index):
        if labels is not None:
            new = score_labels(index, corpus, labels, features, config.seed)
            print(labels_summary(new))
        elif config.endpoint is None:
            new = explain_by_lookup(index, corpus, features, config.seed)
            print(lookup_summary(new))
        else:
            from sae.features.explanations.judge import explain_by_model

            new = explain_by_model(index, corpus, features, config)
        path = write_explanations(config.index, new)
    print(f"{len(new):,} explanations written to {path}")
    return path


def choose(index: FeatureIndex, config: ExplainConfig) -> list[int]:
    for j in config.features:
        index.feature(j)
    if config.features:
        return sorted(set(config.features))
    if config.sample is None:
        return list(range(index.d_sae))
    alive = np.flatnonzero(index.columns["count"])
    if not 1 <= config.sample <= len(alive):
        raise InputError(f"expected --sample between 1 and {len(alive)}, the features that fire, but got {config.sample}")
    return sorted(np.random.default_rng(config.seed).permutation(alive)[: config.sample].tolist())


def explain_by_lookup(index: FeatureIndex, corpus: ScannedText, features: Sequence[int], seed: int) -> list[Explanation]:
    """Token, bigram and pattern of every feature, scored on the held-out documents beside trivial baselines.

    The "shuffled" baseline is the explanation of the feature before it in one random round of all that fire: the same for any choice of
    `features`.
    """
    alive = np.random.default_rng(seed).permutation(np.flatnonzero(index.columns["count"]))
    before = dict(zip(alive.tolist(), np.roll(alive, 1).tolist()))
    scorer = PredictionScorer(corpus, seed)
    last: tuple[int, dict[str, Explained]] = (-1, {})

    def lookups(j: int) -> dict[str, Explained]:
        learn, _ = corpus.firing(index, j)
        return {method: lookup(corpus, learn) for method, lookup in LOOKUPS.items()}

    found = []
    place = {j: i for i, j in enumerate(alive.tolist())}
    with progress("explain", len(features), "features") as bar:
        for j in sorted(features, key=lambda j: place.get(j, len(place))):  # neighbours in the round: each is looked up once
            learn, held = corpus.firing(index, j)
            mine = lookups(j)
            other = before.get(j, j)
            theirs = {} if other == j else last[1] if last[0] == other else lookups(other)
            baselines = trivial(corpus, learn, held)
            token: dict[str, Any] = {}
            for method, (rules, prediction) in mine.items():
                scores = scorer.score(held, prediction)
                beside = baselines | ({"token": token} if token else {})
                if theirs:
                    beside["shuffled"] = point(scorer.score(held, theirs[method].prediction, intervals=False))
                token = token or point(scores)
                text = rules_text(rules, index.vocabulary) if len(learn.rows) else "never fires in the documents learned from"
                found.append(Explanation(j, method, text, scores, beside))
            last = (j, mine)
            bar.advance(1)
    return found


def lookup_summary(explanations: Sequence[Explanation]) -> str:
    """A table: quartiles over the features that fire in the held-out documents, of each method and of what it is compared with."""
    rows: dict[str, list[tuple[Any, Any]]] = {}
    for e in explanations:
        if e.scores["f1"] is None:
            continue
        rows.setdefault(e.method, []).append((e.scores["f1"], e.scores["correlation"]))
        for name in ("always", "random", "shuffled"):
            if name in e.baselines:
                key = f"{name} ({e.method})" if name == "shuffled" else name
                rows.setdefault(key, []).append((e.baselines[name]["f1"], e.baselines[name].get("correlation")))
    lines = [f"{'':<20}{'features':>9}   {'F1: 25 %':>9}{'median':>8}{'75 %':>8}   {'r: 25 %':>9}{'median':>8}{'75 %':>8}"]
    for name, pairs in rows.items():
        cells = []
        for column in zip(*pairs):
            known = [value for value in column if value is not None]
            quartiles = np.percentile(known, [25, 50, 75]) if known else [np.nan] * 3
            cells.append("{:>9.3f}{:>8.3f}{:>8.3f}".format(*quartiles) if known else f"{'—':>9}{'—':>8}{'—':>8}")
        count = len(pairs) if "(" in name or name in LOOKUPS else len(pairs) // len(LOOKUPS)
        lines.append(f"{name:<20}{count:>9,}   {'   '.join(cells)}")
    return "\n".join(lines)
