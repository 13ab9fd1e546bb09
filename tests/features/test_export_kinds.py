"""What every kind of dictionary looks like in other tools' formats, against encoding all cached activations at once."""

import gzip
import json
import struct
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from feature_world import VOCABULARY

from sae.activations.cache import ActivationCache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import AbsTopK, Threshold, TopK
from sae.errors import InputError
from sae.features.exports.command import ExportConfig, export_features
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex

F = 12
MLP = {"site": "resid_pre.0", "site_out": "mlp_out.0"}
KINDS = {
    "jumprelu": dict(gate=Threshold(torch.linspace(0, 0.6, F))),
    "topk": dict(gate=TopK(3)),
    "abstopk": dict(gate=AbsTopK(3)),
    "layer norm": dict(frame=Frame("layer_norm")),
    "transcoder": dict(metadata=MLP),
    "skip transcoder": dict(metadata=MLP, W_skip_od=torch.eye(VOCABULARY) / 3),
}


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / "cache"
    text = str(world.cache.parent / "text.jsonl")
    config = HarvestConfig(
        text=(text,), out=folder, model=str(world.model), sites=("resid_pre.0", "mlp_out.0"), tokens=2000, context=32, dtype="float32",
        held_out=0.1, device="cpu", shard_tokens=1000, pool_tokens=1000,
    )  # fmt: skip
    harvest(config)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def exported(request, cache, tmp_path_factory):
    """kind, dictionary, its activations [tokens, f] by brute force, and the three formats written."""
    folder, g = tmp_path_factory.mktemp("export"), torch.Generator().manual_seed(0)
    model = json.loads((cache / "manifest.json").read_text())["model"]
    kind = KINDS[request.param]
    metadata = {"model_name": model["name"], "model_fingerprint": model["fingerprint"], "site": "resid_pre.0"} | kind.get("metadata", {})
    W_enc_fd, W_dec_fd = torch.randn(2, F, VOCABULARY, generator=g)
    rest = {**kind, "metadata": metadata}
    dictionary = Dictionary(W_enc_fd, torch.full((F,), -0.3), W_dec_fd / 9, torch.zeros(VOCABULARY), **rest).requires_grad_(False)
    dictionary.save(folder / "sae")
    index = FeatureIndex.open(
        build_index(
            IndexConfig(cache=cache, dictionary=str(folder / "sae"), out=folder / "index", splits=("train", "held_out"), device="cpu")
        )
    )
    opened = ActivationCache.open(cache, "resid_pre.0")
    acts = np.zeros((len(index.tokens["ids"]), F), np.float16)
    for split in ("train", "held_out"):
        for shard in opened.shards(split):
            x, rows = opened.read(shard)
            acts[rows] = dictionary.encode(x).numpy()
    given = {} if request.param == "layer norm" else {"dictionary": str(folder / "sae")}
    for name in ("neuronpedia", "saedashboard"):
        export_features(ExportConfig(index=index.folder, out=folder / name, format=name, **given))
    for name in ("neuronpedia-upload", "circuit-tracer"):
        export_features(ExportConfig(index=index.folder, out=folder / name, format=name))
    return request.param, dictionary, acts, index, folder


def rows(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]


def test_neuronpedia(exported):
    kind, dictionary, acts, index, folder = exported
    features = rows(folder / "neuronpedia/features/batch-0.jsonl.gz")
    activations = rows(folder / "neuronpedia/activations/batch-0.jsonl.gz")
    transcoder = "transcoder" in kind
    source_set = "transcoder-12" if transcoder else "res-pre-12"
    for j, row in enumerate(features):
        assert (row["layer"], row["sourceSetName"]) == (f"0-{source_set}", source_set)
        # Neuronpedia uses the hook for nothing but adding the vector
        assert row["hookName"] == ("blocks.0.hook_mlp_out" if transcoder else "blocks.0.hook_resid_pre")
        assert row["vector"] == ([] if kind == "layer norm" else dictionary.W_dec_fo[j].tolist())
        assert row["maxActApprox"] == np.abs(acts[:, j]).max()
        assert row["frac_nonzero"] == (acts[:, j] != 0).sum() / index.info["tokens_scanned"]
    found = 0
    for row in activations:
        value = row["values"][row["qualifyingTokenIndex"]]
        assert value in acts[:, int(row["index"])].tolist()
        assert (row["maxValue"], row["minValue"]) == (max(row["values"]), min(row["values"]))
        assert (row["dataSource"] == "bottom") == (value < 0)  # how Neuronpedia marks a context to be shown around its lowest value
        if row["binMin"] != -1:
            assert row["binMin"] <= abs(value) < row["binMax"]
        found += value < 0
    assert bool(found) == (kind == "abstopk")


def test_saedashboard(exported):
    kind, dictionary, acts, _index, folder = exported
    batch = json.loads((folder / "saedashboard/batch-0.json").read_text(encoding="utf-8"))
    assert batch["sae_set"] == ("transcoder-12" if "transcoder" in kind else "res-pre-12")
    for row in batch["features"]:
        values = acts[:, row["feature_index"]].astype(np.float64)
        values = values[values != 0]
        heights, edges = np.histogram(values, 50, (min(values.min(), 0), max(values.max(), 0)))
        assert row["freq_hist_data_bar_heights"] == heights.tolist()
        np.testing.assert_allclose(row["freq_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2)
        assert row["vector"] == ([] if kind == "layer norm" else dictionary.W_dec_fo[row["feature_index"]].tolist())
        top = [activation for activation in row["activations"] if activation["bin_min"] == -1]
        best = values[np.argmax(np.abs(values))]
        assert top[0]["values"][top[0]["qualifying_token_index"]] == best
    assert any((acts[:, row["feature_index"]] < 0).any() for row in batch["features"]) == (kind == "abstopk")


def test_uploads_and_circuit_tracer(exported):
    kind, _, acts, _index, folder = exported
    body = json.loads((folder / "neuronpedia-upload/upload-0.json").read_text(encoding="utf-8"))
    for feature in body["features"]:
        seen = {value for activation in feature["activations"] for value in activation["values"]}
        assert seen <= {0.0, *acts[:, feature["index"]].tolist()}
    entry = json.loads(gzip.decompress((folder / "circuit-tracer/features/index.json.gz").read_bytes()))["0"]
    data = (folder / "circuit-tracer/features" / entry["filename"]).read_bytes()
    for j, start in enumerate(entry["offsets"][:-1]):
        (length,) = struct.unpack("<I", data[start : start + 4])
        record = json.loads(gzip.decompress(data[start + 4 : start + 4 + length]))
        values = acts[:, j].astype(np.float64)
        assert (record["act_min"], record["act_max"]) == (min(values.min(), 0), max(values.max(), 0))
        values = values[values != 0]
        np.testing.assert_allclose(record["quantile_values"], np.quantile(values, np.linspace(0, 1, 101)) if len(values) else [])
        assert record["transcoder_id"] == body["source"]
        assert (record["act_min"] < 0) <= (kind == "abstopk")


def test_vectors_are_refused_where_a_feature_adds_another_at_every_token(exported, tmp_path):
    kind, _, _, index, folder = exported
    refused = kind == "layer norm"
    with pytest.raises(InputError, match="leave out --dictionary") if refused else nullcontext():
        export_features(ExportConfig(index=index.folder, out=tmp_path / "out", format="neuronpedia", dictionary=str(folder / "sae")))
    assert (tmp_path / "out").exists() != refused


def test_negative_activations_are_announced(exported, tmp_path, capsys):
    kind, _, _, index, _ = exported
    export_features(ExportConfig(index=index.folder, out=tmp_path / "out", format="saedashboard"))
    assert ("below 0" in capsys.readouterr().err) == (kind == "abstopk")
