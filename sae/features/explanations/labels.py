"""Existing labels, read from Neuronpedia's export and scored on this index's text without a model.

A label is scored by its own words: it predicts firing on every token of the text that contains one of them. That is strict for a label that
describes words without listing them, so each score is compared with that of another feature's label and of the token look-up.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from typing_extensions import NotRequired, TypedDict

from sae.disk.reading import read_json_lines
from sae.errors import InputError
from sae.features.explanations.explanation import Explanation
from sae.features.explanations.lookups import Prediction, ScannedText, token_lookup
from sae.features.explanations.scores import PredictionScorer, point, trivial
from sae.features.index.reader import FeatureIndex
from sae.features.index.words import WORD, all_words, folded
from sae.progress import progress
from sae.text_input import replace_surrogates

_COMMON = """
a about after all also an and any are as at be been before being between both but by can contain containing content context contexts
could denoting describe describing do does during each either end especially etc expression expressions feature fires for form forms
from had has have how if in include including indicate indicates indicating instance instances into is it its language letter letters
like mention mentions might more most names not of often on one or other particularly pattern patterns phrase phrases preceded
precedes reference references referring related relating s sentence sentences set several similar some specific specifically start
such symbol symbols term terms text texts than that the their them then there these they this those to token tokens topic topics two
type types use used uses using variations various was were what when where which while who whose will with within word words would
"""
EMPTY_WORDS = frozenset(_COMMON.split())
"""words that only phrase a label, and do not say what fires"""


class Row(TypedDict):
    modelId: str
    layer: str
    index: str
    description: str
    typeName: NotRequired[str | None]
    explanationModelName: NotRequired[str | None]
    authorId: NotRequired[str | None]


def read_labels(path: Path, d_sae: int) -> dict[int, list[tuple[str, str]]]:
    """The labels of every feature: the method, "neuronpedia: " with type, model and author, and the text.

    Raises `InputError` if there are none, and for labels of another number of features.
    """
    files = [path] if path.is_file() else sorted([*path.glob("explanations/*.jsonl.gz"), *path.glob("*.jsonl.gz")])
    found: dict[int, list[tuple[str, str]]] = {}
    sources: Counter[str] = Counter()
    for file in files:
        for row in read_json_lines(file, "labels of Neuronpedia", Row):
            if not row["index"].isdecimal() or int(row["index"]) >= d_sae:
                raise InputError(
                    f"expected labels of features 0 to {d_sae - 1:,}, the index's own, got one of {row['index']} in {file}; "
                    "give those of this dictionary"
                )
            parts = (row.get("typeName"), row.get("explanationModelName"), row.get("authorId"))
            method, text = ": ".join(filter(None, ["neuronpedia", ", ".join(filter(None, parts))])), " ".join(row["description"].split())
            mine = found.setdefault(int(row["index"]), [])
            same = sum(known.partition(" #")[0] == method for known, _ in mine)
            method, text = (replace_surrogates(part)[0] for part in (f"{method} #{same + 1}" if same else method, text))
            mine.append((method, text))
            sources[f"{row['modelId']}/{row['layer']}"] += 1
    if not found:
        raise InputError(f"expected labels of Neuronpedia in {path}, such as explanations/batch-0.jsonl.gz, found none; fetch them")
    print(", ".join(f"{count:,} labels of {source}" for source, count in sources.items()) + f", for {len(found):,} features")
    return found


def score_labels(
    index: FeatureIndex, corpus: ScannedText, labels: dict[int, list[tuple[str, str]]], features: Sequence[int], seed: int
) -> list[Explanation]:
    """Every label of `features` as an `Explanation`. The "shuffled" baseline is the first label of the feature before it in one random
    round of all that have one."""
    where = all_words(index.tokens["ids"], index.tokens["sequence_starts"], index.vocabulary)
    around = np.random.default_rng(seed).permutation(sorted(labels))
    before = dict(zip(around.tolist(), np.roll(around, 1).tolist()))
    scorer = PredictionScorer(corpus, seed)
    chosen = [j for j in features if j in labels]
    found = []
    with progress("score labels", len(chosen), "features") as bar:
        for j in chosen:
            learn, held = corpus.firing(index, j)
            beside = trivial(corpus, learn, held)
            beside["token"] = point(scorer.score(held, token_lookup(corpus, learn).prediction, intervals=False))
            if before[j] != j:
                other = predicted(corpus, where, labels[before[j]][0][1])
                beside["shuffled"] = point(scorer.score(held, other, intervals=False))
            for method, text in labels[j]:
                found.append(Explanation(j, method, text, scorer.score(held, predicted(corpus, where, text)), beside))
            bar.advance(1)
    return found


def predicted(corpus: ScannedText, where: dict[str, np.ndarray], text: str) -> Prediction:
    """Firing, with one activation for all, on every held-out token of a word that the text names, or of its plural or singular."""
    tokens = [where[form] for word in label_words(text) for form in {word, f"{word}s", word.removesuffix("s")} if form in where]
    rows = corpus.row_of[np.unique(np.concatenate(tokens))] if tokens else np.zeros(0, np.int64)
    rows = rows[rows >= 0]
    rows = rows[corpus.held_n[rows]]
    return Prediction(rows, np.ones(len(rows)), np.ones(len(rows), bool))


def label_words(text: str) -> list[str]:
    """Its words, normalised as in searches, without those that all labels use."""
    return [word for match in WORD.finditer(text) if (word := folded(match.group())) not in EMPTY_WORDS]


def labels_summary(scored: Sequence[Explanation]) -> str:
    """Median F1 over the labels of features that fire in the held-out documents, with the baselines."""
    known = [e for e in scored if e.scores["f1"] is not None]
    if not known:
        return "no feature with a label fires in the held-out documents, so nothing is scored"
    own = np.median([e.scores["f1"] for e in known])
    medians = {}
    for name in ("shuffled", "token", "always"):
        values = [e.baselines[name]["f1"] for e in known if name in e.baselines]
        medians[name] = float(np.median(values)) if values else float("nan")
    line = (
        f"median F1 of firing over {len(known):,} labels: {own:.3f} by the labels' words, {medians['shuffled']:.3f} by another feature's "
        f"label, {medians['token']:.3f} by the token look-up, {medians['always']:.3f} by firing always"
    )
    if not own > medians["shuffled"] and np.isfinite(medians["shuffled"]):
        line += "\nthe labels predict no better than those of other features: they may belong to another dictionary"
    return line
