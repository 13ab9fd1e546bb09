"""Neuronpedia: its export folder written and read, the JSON of its API for one feature, and files for its upload of batches.

The folder has model.jsonl, release.jsonl, sourceset.jsonl, source.jsonl, and features/, activations/ and explanations/batch-N.jsonl.gz.
Neuronpedia names a dictionary by a model and a source such as 2-res-4k, and a feature by its number as a string.
"""

import gzip
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from typing_extensions import TypedDict

from sae.disk.reading import read_json_lines
from sae.disk.writing import atomic
from sae.errors import InputError
from sae.features.exports.saedashboard import Names, encoded, example_rows, names_of, tables
from sae.progress import progress

if TYPE_CHECKING:
    from sae.features.explanations.explanation import Explanation
    from sae.features.index.reader import FeatureIndex

BATCH = 1024  # features per file of the folder, as in Neuronpedia's own
UPLOAD = {"features": 128, "logits": 20, "text": 512, "tokens": 1024, "index": 10**7}  # the most that one upload takes
NEIGHBOURS = 10
BOTTOM = "bottom"  # the dataSource by which Neuronpedia shows a context around its lowest value, in red
PARTS = ("features", "activations", "explanations")
ROWS = "rows of JSON"
META = ("model", "release", "sourceset", "source")
ACTIVATION = (
    *("id", "tokens", "modelId", "layer", "index", "maxValue", "maxValueTokenIndex", "minValue", "values", "dfaValues", "dfaTargetIndex"),
    *("dfaMaxValue", "lossValues", "logitContributions", "binMin", "binMax", "binContains", "qualifyingTokenIndex", "zQIndices"),
    *("zKIndices", "zValues", "creatorId", "createdAt", "dataSource", "dataIndex"),
)


class FeatureRow(TypedDict):
    modelId: str
    layer: str
    index: str


class ActivationRow(FeatureRow):
    tokens: list[str]
    values: list[float]


class ExplanationRow(FeatureRow):
    description: str


SCHEMAS: dict[str, Any] = {"features": FeatureRow, "activations": ActivationRow, "explanations": ExplanationRow}


def source_of(index: "FeatureIndex") -> tuple[str, str]:
    """Model and source, as in URLs."""
    names = names_of(index)
    return names.model, names.source


def feature_json(index: "FeatureIndex", j: int, explanations: "Sequence[Explanation]" = ()) -> dict[str, Any]:
    """Neuronpedia's answer to GET /api/feature/MODEL/SOURCE/J. Raises `InputError` if there is no such feature."""
    names, created = names_of(index), _created(index)
    row = feature_row(index, j, names, "local", created, None)
    row["activations"] = list(activation_rows(index, j, names, "local", created))
    return row | {"explanations": list(explanation_rows(index, j, names, "local", explanations))}


def feature_row(index: "FeatureIndex", j: int, names: Names, creator: str, created: str, W_dec_fd: np.ndarray | None) -> dict[str, Any]:
    near, top = index.cosine_neighbours(j, NEIGHBOURS), index.feature(j).maximum
    return {
        "modelId": names.model,
        "layer": names.source,
        "index": str(j),
        "creatorId": creator,
        "createdAt": created,
        "maxActApprox": abs(top),
        "hasVector": W_dec_fd is not None,
        "vector": [] if W_dec_fd is None else W_dec_fd[j].tolist(),
        "vectorLabel": None,
        "vectorDefaultSteerStrength": top,
        "hookName": names.hook,
        "topkCosSimIndices": [other for other, _ in near],
        "topkCosSimValues": [cosine for _, cosine in near],
        **tables(index, j, W_dec_fd),
        "sourceSetName": names.set,
    }


def activation_rows(index: "FeatureIndex", j: int, names: Names, creator: str, created: str) -> Iterator[dict[str, Any]]:
    for n, (low, high, contains, context) in enumerate(example_rows(index, j)):
        values = context.values.tolist()
        row: dict[str, Any] = dict.fromkeys(ACTIVATION)
        row |= {"id": _identity(index, "activation", j, n), "tokens": context.texts, "modelId": names.model, "layer": names.source}
        row |= {"index": str(j), "maxValue": max(values), "maxValueTokenIndex": values.index(max(values)), "minValue": min(values)}
        row |= {"values": values, "dfaValues": [], "lossValues": [], "zQIndices": [], "zKIndices": [], "zValues": []}
        row |= {"binMin": low, "binMax": high, "binContains": contains, "qualifyingTokenIndex": context.centre}
        label = BOTTOM if context.value < 0 else context.label
        yield row | {"creatorId": creator, "createdAt": created, "dataSource": label, "dataIndex": str(context.document)}


def explanation_rows(
    index: "FeatureIndex", j: int, names: Names, creator: str, explanations: "Sequence[Explanation]"
) -> Iterator[dict[str, Any]]:
    for n, explanation in enumerate(explanations):
        method, _, model = explanation.method.partition(":")
        row: dict[str, Any] = {"id": _identity(index, "explanation", j, n), "modelId": names.model, "layer": names.source, "index": str(j)}
        row |= {"authorId": creator, "description": explanation.text, "typeName": method, "explanationModelName": model or None}
        yield row | {"embedding": [], "umap_x": 0, "umap_y": 0, "umap_cluster": 0, "umap_log_feature_sparsity": 0}


def write_neuronpedia(
    index: "FeatureIndex",
    folder: Path,
    features: Sequence[int],
    names: Names,
    explanations: "dict[int, list[Explanation]]",
    creator: str,
    W_dec_fd: np.ndarray | None = None,
) -> None:
    """Writes `features` into the empty `folder` in the format of Neuronpedia's export of a source."""
    created = _created(index)
    for name, row in _meta(index, names, creator, created).items():
        _write_rows(folder / f"{name}.jsonl", [row])
    with progress("write batches", len(features), "features") as bar:
        for n, low in enumerate(range(0, len(features), BATCH)):
            rows: dict[str, list] = {part: [] for part in PARTS}
            for j in features[low : low + BATCH]:
                rows["features"].append(feature_row(index, j, names, creator, created, W_dec_fd))
                rows["activations"] += activation_rows(index, j, names, creator, created)
                rows["explanations"] += explanation_rows(index, j, names, creator, explanations.get(j, ()))
                bar.advance(1)
            for part in PARTS:
                _write_rows(folder / part / f"batch-{n}.jsonl.gz", rows[part])


def write_uploads(
    index: "FeatureIndex", folder: Path, features: Sequence[int], names: Names, explanations: "dict[int, list[Explanation]]"
) -> None:
    """Bodies for POST /api/feature/upload-batch, one file per request. Features that never fire are left out: an activation is required.

    Raises `InputError` if the index exceeds the limits of an upload.
    """
    alive = [j for j in features if index.columns["count"][j]]
    if not alive:
        raise InputError("expected at least one feature that fires; an upload needs an activation of each")
    if max(alive) > UPLOAD["index"]:
        raise InputError(f"expected features up to {UPLOAD['index']:,}, the most that Neuronpedia takes, but got {max(alive):,}")
    with progress("write uploads", len(alive), "features") as bar:
        for n, low in enumerate(range(0, len(alive), UPLOAD["features"])):
            part = alive[low : low + UPLOAD["features"]]
            body = {"modelId": names.model, "source": names.source, "features": [_upload(index, j, explanations.get(j, ())) for j in part]}
            with atomic(folder / f"upload-{n}.json") as temporary:
                temporary.write_text(json.dumps(body, ensure_ascii=False, allow_nan=False), encoding="utf-8")
            bar.advance(len(part))
    print(f"left out {len(features) - len(alive):,} features that never fire")


def _upload(index: "FeatureIndex", j: int, explanations: "Sequence[Explanation]") -> dict[str, Any]:
    word = index.vocabulary.spelling
    row: dict[str, Any] = {"index": int(j), "density": int(index.columns["count"][j]) / int(index.info["tokens_scanned"])}
    for name, bottom in (("topLogits", False), ("bottomLogits", True)):
        tokens = index.lens_tokens(j, UPLOAD["logits"], bottom=bottom)
        row[name] = [{"token": word(token), "value": float(value)} for token, value in tokens]
    if explanations:
        row["explanations"] = [
            {"text": e.text[: UPLOAD["text"]], "methodName": e.method.partition(":")[0], "modelName": e.method.partition(":")[2] or "none"}
            for e in explanations
        ]
    row["activations"] = []
    for low, high, contains, context in example_rows(index, j):
        activation: dict[str, Any] = {"tokens": context.texts[: UPLOAD["tokens"]], "values": context.values.tolist()[: UPLOAD["tokens"]]}
        if contains >= 0:
            activation |= {"quantileMin": low, "quantileMax": high, "quantileFraction": contains}
        row["activations"].append(activation)
    return row


class NeuronpediaFolder(NamedTuple):
    """An export of Neuronpedia, field for field; batches are read one at a time, since a source can be larger than memory."""

    folder: Path
    meta: dict[str, list[dict[str, Any]]]
    """existing rows of model.jsonl, release.jsonl, sourceset.jsonl and source.jsonl"""
    names: dict[str, list[str]]
    """files of features/, activations/ and explanations/, in order"""

    def rows(self, part: str, name: str) -> list[dict[str, Any]]:
        """Rows of one file. Raises `InputError` if one lacks its feature's name."""
        return read_json_lines(self.folder / part / name, ROWS, SCHEMAS[part])


def read_neuronpedia(folder: str | Path) -> NeuronpediaFolder:
    """Raises `InputError` if the folder is not an export of Neuronpedia."""
    folder = Path(folder)
    names = {}
    for part in PARTS:
        paths = folder.glob(f"{part}/*.jsonl.gz")
        names[part] = [path.name for path in sorted(paths, key=lambda path: (len(path.name), path.name))]
    if not names["features"]:
        raise InputError(f"expected features/batch-0.jsonl.gz of an export of Neuronpedia in {folder}, but there is none")
    there = [name for name in META if (folder / f"{name}.jsonl").exists()]
    meta = {name: read_json_lines(folder / f"{name}.jsonl", ROWS, dict[str, Any]) for name in there}
    return NeuronpediaFolder(folder, meta, names)


def maximum_activation(folder: Path, feature: int) -> float:
    """The feature's maxActApprox in an export of Neuronpedia. Raises `InputError` if it is missing."""
    found = read_neuronpedia(folder)
    names = found.names["features"]
    likely = f"batch-{feature // BATCH}.jsonl.gz"  # as Neuronpedia's exporter deals them; others have batches of other sizes
    for name in sorted(names, key=lambda name: name != likely):
        for row in found.rows("features", name):
            if row["index"] == str(feature):
                highest = row.get("maxActApprox")
                if not isinstance(highest, float | int) or not 0 < highest < math.inf:
                    raise InputError(f"expected maxActApprox above 0 of feature {feature} in {folder}, got {highest!r}; it cannot steer")
                return float(highest)
    raise InputError(f"expected feature {feature} in {folder}, but none of its {len(names)} files in features/ has it; fetch the rest")


def rewrite_neuronpedia(read: NeuronpediaFolder, folder: Path) -> None:
    """Writes the result of `read_neuronpedia` into the empty `folder`."""
    for name, rows in read.meta.items():
        _write_rows(folder / f"{name}.jsonl", rows)
    for part, names in read.names.items():
        for name in names:
            _write_rows(folder / part / name, read.rows(part, name))


def _meta(index: "FeatureIndex", names: Names, creator: str, created: str) -> dict[str, dict[str, Any]]:
    """Rows of the four small files: known facts, and Neuronpedia's defaults for the rest."""
    starts = index.tokens["sequence_starts"]
    shared = {"creatorId": creator, "createdAt": created}
    model: dict[str, Any] = {
        "id": names.model,
        "instruct": False,
        "displayNameShort": names.model,
        "displayName": names.model,
        "tlensId": None,
    }
    model |= {"dimension": index.info["d_in"], "visibility": "PUBLIC", "defaultSourceSetName": None, "defaultSourceId": None}
    model |= {"inferenceEnabled": False, "layers": 0, "neuronsPerLayer": 0, "owner": "", "updatedAt": created, "website": None}
    release: dict[str, Any] = {"name": names.set, "description": f"{names.set} of {names.model}", "descriptionShort": names.set, "urls": []}
    release |= {"creatorName": creator, "creatorNameShort": creator, "creatorEmail": None, "visibility": "PUBLIC", "isNewUi": False}
    release |= {"featured": False, "defaultSourceSetName": None, "defaultSourceId": None, "defaultUmapSourceIds": []}
    sourceset: dict[str, Any] = {
        "modelId": names.model,
        "name": names.set,
        "hasDashboards": True,
        "visibility": "PUBLIC",
        "description": "",
        "type": "",
    }
    sourceset |= {"creatorName": creator, "urls": [], "creatorEmail": None, "releaseName": names.set, "defaultOfModelId": None}
    sourceset |= {"defaultRange": 1, "defaultShowBreaks": True, "showDfa": False, "showCorrelated": False, "showHeadAttribution": False}
    source: dict[str, Any] = {
        "id": names.source,
        "modelId": names.model,
        "setName": names.set,
        "hasDashboards": True,
        "inferenceEnabled": False,
    }
    source |= {"inferenceHosts": [], "saelensConfig": None, "saelensRelease": None, "saelensSaeId": None, "hfRepoId": None}
    source |= {"hfFolderId": None, "visibility": "PUBLIC", "defaultOfModelId": None, "hasUmap": False, "hasUmapLogSparsity": False}
    source |= {"hasUmapClusters": False, "num_prompts": len(starts) - 1, "num_tokens_in_prompt": int(np.diff(starts).max())}
    source |= {"dataset": None, "notes": None}
    return {
        "model": model | shared,
        "release": release | shared,
        "sourceset": sourceset | {"showUmap": False} | shared,
        "source": source | shared,
    }


def _identity(index: "FeatureIndex", kind: str, j: int, n: int) -> str:
    """25 letters like Neuronpedia's, the same in every export of one dictionary."""
    key = f"{index.info['dictionary_crc32']}/{kind}/{j}/{n}"
    return "c" + hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def _created(index: "FeatureIndex") -> str:
    """The time when the index was built, so that two exports of it are equal."""
    return datetime.fromtimestamp((index.folder / "index.json").stat().st_mtime, timezone.utc).isoformat(timespec="seconds")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    data = b"".join(encoded(row, path) + b"\n" for row in rows)
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
