"""Neuronpedia's files parsed by hand, its limits kept, and exports read back as they were."""

import gzip
import json

import numpy as np
import pytest

from sae.errors import InputError
from sae.features.explanations.explanation import Explanation
from sae.features.exports.command import ExportConfig, export_features
from sae.features.exports.neuronpedia import (
    feature_json,
    read_neuronpedia,
    rewrite_neuronpedia,
    source_of,
    write_neuronpedia,
    write_uploads,
)
from sae.features.exports.saedashboard import names_of

FEATURE = {
    *("modelId", "layer", "index", "creatorId", "createdAt", "maxActApprox", "hasVector", "vector", "vectorLabel"),
    *("vectorDefaultSteerStrength", "hookName", "topkCosSimIndices", "topkCosSimValues", "neuron_alignment_indices"),
    *("neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_pearson"),
    *("correlated_neurons_l1", "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1", "neg_str"),
    *("neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "sourceSetName"),
}
ACTIVATION = {
    *("id", "tokens", "modelId", "layer", "index", "maxValue", "maxValueTokenIndex", "minValue", "values", "dfaValues", "dfaTargetIndex"),
    *("dfaMaxValue", "lossValues", "logitContributions", "binMin", "binMax", "binContains", "qualifyingTokenIndex", "zQIndices"),
    *("zKIndices", "zValues", "creatorId", "createdAt", "dataSource", "dataIndex"),
}
EXPLANATION = {
    *("id", "modelId", "layer", "index", "authorId", "description", "typeName", "explanationModelName", "embedding"),
    *("umap_x", "umap_y", "umap_cluster", "umap_log_feature_sparsity"),
}


def explanation(j, method="token", text="fires on 🦓 & <b>"):
    return Explanation(feature=j, method=method, text=text, scores={"f1": 0.5}, baselines={})


def rows(path):
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("neuronpedia") / "out"
    out.mkdir()
    why = {17: [explanation(17), explanation(17, "model:judge-7b", "zebras")]}
    write_neuronpedia(world.index, out, range(40), names_of(world.index), why, "me", world.dictionary.W_dec_fo.numpy())
    return out


def test_the_folder_has_the_files_and_fields_of_an_export(world, dense, folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {f"{name}.jsonl" for name in ("model", "release", "sourceset", "source")} | {
        f"{part}/batch-0.jsonl.gz" for part in ("features", "activations", "explanations")
    }
    features = rows(folder / "features/batch-0.jsonl.gz")
    assert [row["index"] for row in features] == [str(j) for j in range(40)]
    row = features[17]
    assert set(row) == FEATURE
    assert (row["modelId"], row["layer"], row["sourceSetName"], row["hookName"]) == (
        "model",
        "0-res-pre-40",
        "res-pre-40",
        "blocks.0.hook_resid_pre",
    )
    assert row["maxActApprox"] == dense[:, 17].max()
    assert row["vector"] == world.dictionary.W_dec_fo[17].tolist()
    W_dec_fd = world.dictionary.W_dec_fo.numpy().astype(np.float64)
    cosines = W_dec_fd @ W_dec_fd[17] / (np.linalg.norm(W_dec_fd, axis=1) * np.linalg.norm(W_dec_fd[17]))
    assert row["topkCosSimValues"] == pytest.approx(np.sort(np.delete(cosines, 17))[::-1][:10], abs=1e-5)
    activations = rows(folder / "activations/batch-0.jsonl.gz")
    assert all(set(a) == ACTIVATION for a in activations)
    assert len({a["id"] for a in activations}) == len(activations)
    assert all(len(a["id"]) == 25 for a in activations)
    for a in activations:
        assert a["maxValue"] == max(a["values"]) == a["values"][a["maxValueTokenIndex"]]
        assert a["minValue"] == min(a["values"])
        assert len(a["tokens"]) == len(a["values"])
    top = [a for a in activations if a["index"] == "17" and a["binMin"] == -1]
    assert ["".join(a["tokens"]) for a in top] == ["".join(c.texts) for c in world.index.top_contexts(17, 20)]
    found = rows(folder / "explanations/batch-0.jsonl.gz")
    assert all(set(e) == EXPLANATION for e in found)
    assert [(e["index"], e["description"], e["typeName"], e["explanationModelName"]) for e in found] == [
        ("17", "fires on 🦓 & <b>", "token", None),
        ("17", "zebras", "model", "judge-7b"),
    ]
    (source,) = rows(folder / "source.jsonl")
    assert (source["id"], source["modelId"], source["setName"]) == ("0-res-pre-40", "model", "res-pre-40")


def test_the_answer_for_one_feature_has_the_same_fields(world):
    answer = feature_json(world.index, 17, [explanation(17)])
    assert set(answer) == FEATURE | {"activations", "explanations"}
    assert source_of(world.index) == (answer["modelId"], answer["layer"]) == ("model", "0-res-pre-40")
    assert all(set(a) == ACTIVATION for a in answer["activations"])
    json.dumps(answer, allow_nan=False)
    assert feature_json(world.index, 3)["activations"] == []
    with pytest.raises(InputError):
        feature_json(world.index, 40)


def test_uploads_keep_the_limits(world, dense, tmp_path, monkeypatch):
    from sae.features.exports import neuronpedia

    monkeypatch.setitem(neuronpedia.UPLOAD, "features", 16)  # of 128, so that this small index needs several
    why = {17: [explanation(17, text="x" * 600)]}
    write_uploads(world.index, tmp_path, range(40), names_of(world.index), why)
    bodies = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.iterdir())]
    sent = [feature for body in bodies for feature in body["features"]]
    assert [feature["index"] for feature in sent] == np.flatnonzero(dense.any(0)).tolist()
    assert len(bodies) == -(-len(sent) // 16)
    for body in bodies:
        assert set(body) == {"modelId", "source", "features"}
        assert 1 <= len(body["features"]) <= 16
    for feature in sent:
        assert set(feature) <= {"index", "density", "topLogits", "bottomLogits", "explanations", "activations"}
        assert len(feature["topLogits"]) <= 20
        assert len(feature["bottomLogits"]) <= 20
        assert feature["activations"]
        for a in feature["activations"]:
            assert set(a) in ({"tokens", "values"}, {"tokens", "values", "quantileMin", "quantileMax", "quantileFraction"})
            assert 1 <= len(a["tokens"]) == len(a["values"]) <= 1024
    assert [len(e["text"]) for f in sent for e in f.get("explanations", [])] == [512]


def test_what_is_read_is_written_again_field_for_field(folder, tmp_path):
    """Also an export with fields we do not know, rows of other authors and several batches, under names of theirs."""
    theirs = tmp_path / "theirs"
    for path in folder.rglob("*.jsonl*"):
        target = theirs / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        found = rows(path)
        for row in found[:2]:
            row |= {"createdAt": "2024-01-01T00:00:00.000Z", "zIndices": [[1, 2]], "unknown": {"a": [1, 1.0, -2.5e-7, None, "\u2028 🦓"]}}
        data = "\n".join(json.dumps(row) for row in found).encode()
        target.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        if path.suffix == ".gz":
            (target.parent / "batch-10.jsonl.gz").write_bytes(target.read_bytes())
    read = read_neuronpedia(theirs)
    assert read.names["features"] == ["batch-0.jsonl.gz", "batch-10.jsonl.gz"]
    rewrite_neuronpedia(read, tmp_path / "ours")
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*") if path.is_file())
    for path in files:
        assert json.dumps(rows(tmp_path / "ours" / path)) == json.dumps(rows(theirs / path))


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="features/batch-0"):
        read_neuronpedia(tmp_path)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "batch-0.jsonl.gz").write_bytes((folder / "features/batch-0.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"batch-0\.jsonl\.gz"):
        read_neuronpedia(tmp_path).rows("features", "batch-0.jsonl.gz")


def test_the_command_writes_equal_folders_and_refuses_flags_without_use(world, tmp_path):
    for name in ("a", "b"):
        export_features(
            ExportConfig(index=world.index.folder, out=tmp_path / name, format="neuronpedia", features=(4, 17), model_id="zebra-lm")
        )
    for path in (tmp_path / "a").rglob("*.jsonl*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    assert {row["modelId"] for row in rows(tmp_path / "a/features/batch-0.jsonl.gz")} == {"zebra-lm"}
    with pytest.raises(InputError, match="--model-id"):
        export_features(ExportConfig(index=world.index.folder, out=tmp_path / "c", model_id="x"))
    with pytest.raises(InputError, match="something else"):
        export_features(ExportConfig(index=world.index.folder, out=tmp_path / "a", format="saedashboard"))
