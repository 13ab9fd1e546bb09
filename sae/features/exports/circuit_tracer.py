"""Packed feature files for circuit-tracer's attribution-graph viewer: features/index.json.gz and features/layer_N.bin.

A record is its length (4 bytes, little-endian) and gzip-compressed JSON; index.json.gz maps a layer to its file and the byte offset of
every feature, and the end. An index has one site; exporting several layers into one folder adds them to the existing ones.
"""

import gzip
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import TypedDict

from sae.disk.reading import Count, parse_json, read_gzip
from sae.disk.writing import atomic, only_writer, remove_leftovers
from sae.features.exports.saedashboard import Names
from sae.progress import progress

if TYPE_CHECKING:
    from sae.features.index.reader import Context, FeatureIndex

LOGITS = 10
QUANTILES = 101  # of the non-zero activations, from the smallest to the largest
TOP = 20


class Layer(TypedDict):
    filename: str
    offsets: list[Count]


def write_circuit_tracer(index: "FeatureIndex", folder: Path, names: Names) -> None:
    """Writes every feature as layer `names.layer` of `folder`/features, replacing that layer if it exists.

    Raises `InputError` if the folder's index.json.gz cannot be read.
    """
    features = folder / "features"
    filename, offsets = f"layer_{names.layer}.bin", [0]
    with only_writer(features):
        remove_leftovers(features)
        layers = _layers(features / "index.json.gz")
        with (
            atomic(features / "index.json.gz") as listing,
            atomic(features / filename) as temporary,
        ):  # both are whole before either takes its name
            with open(temporary, "wb") as file, progress("write", index.d_sae, "features") as bar:
                for j in range(index.d_sae):
                    record = gzip.compress(json.dumps(feature_record(index, j, names), allow_nan=False).encode(), 6, mtime=0)
                    file.write(struct.pack("<I", len(record)) + record)
                    offsets.append(offsets[-1] + 4 + len(record))
                    bar.advance(1)
            layers[str(names.layer)] = {"filename": filename, "offsets": offsets}
            listing.write_bytes(gzip.compress(json.dumps(layers).encode(), 6, mtime=0))


def feature_record(index: "FeatureIndex", j: int, names: Names) -> dict[str, Any]:
    r"""One feature in the viewer's format. Bytes that are not a whole character are written as \xNN, which the viewer joins."""
    feature = index.feature(j)
    values = index.signed_values(j)
    word = index.vocabulary.spelling
    groups = [("Top", index.top_contexts(j, TOP)), ("Random", index.random_contexts(j, TOP))]
    groups += [(f"{bucket.low:.3g} to {bucket.high:.3g}", bucket.contexts) for bucket in index.bucket_contexts(j)]
    seen: set[int] = set()
    return {
        "transcoder_id": names.source,
        "index": cantor_pair(names.layer, j),
        "examples_quantiles": [
            {"quantile_name": name, "examples": [_example(index, context, seen) for context in contexts]}
            for name, contexts in groups
            if contexts
        ],
        "top_logits": [word(token) for token, _ in index.lens_tokens(j, LOGITS)],
        "bottom_logits": [word(token) for token, _ in index.lens_tokens(j, LOGITS, bottom=True)],
        "act_min": min(values.min(initial=0), 0.0),
        "act_max": max(values.max(initial=0), 0.0),
        "quantile_values": np.quantile(values, np.linspace(0, 1, QUANTILES)).tolist() if len(values) else [],
        "histogram": index.histogram(j)[1].tolist(),
        "activation_frequency": int(feature.columns["count"]) / int(index.info["tokens_scanned"]),
    }


def _example(index: "FeatureIndex", context: "Context", seen: set[int]) -> dict[str, Any]:
    """`seen`: the tokens shown before, because the viewer fades repeats."""
    repeated = context.position in seen
    seen.add(context.position)
    tokens = [index.vocabulary.spelling(token) for token in context.ids.tolist()]
    row = {"tokens": tokens, "tokens_acts_list": context.values.tolist()}
    return row | {"train_token_ind": context.centre, "is_repeated_datapoint": repeated}


def cantor_pair(layer: int, j: int) -> int:
    """The viewer's number of a feature: one for every pair of layer and feature."""
    return (layer + j) * (layer + j + 1) // 2 + j


def _layers(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    data = read_gzip(path, "circuit-tracer's list of layers", "choose another --out")
    layers = parse_json(data, f"circuit-tracer's list of layers in {path}", dict[str, Layer] | list[Layer])
    return layers if isinstance(layers, dict) else {str(layer): entry for layer, entry in enumerate(layers)}
