"""SAEDashboard's files, field by field against the index, and read back as they were."""

import json

import numpy as np
import pytest

from sae.errors import InputError
from sae.features.exports.command import ExportConfig, export_features
from sae.features.exports.saedashboard import read_saedashboard, rewrite_saedashboard

FIELDS = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices"),
    *("correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1"),
    *("correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values"),
    *("freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total"),
    *("n_tokens_in_prompt", "dataset", "decoder_weights_dist", "vector", "activations"),
}


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("saedashboard") / "out"
    export_features(ExportConfig(index=world.index.folder, out=out, format="saedashboard", dictionary=world.dictionary_folder))
    return out


def test_a_batch_has_the_fields_and_the_numbers_of_the_index(world, dense, folder):
    batch = json.loads((folder / "batch-0.json").read_text(encoding="utf-8"))
    assert {k: v for k, v in batch.items() if k != "features"} == {
        "model_id": "model",
        "layer": 0,
        "sae_set": "res-pre-40",
        "sae_id_suffix": None,
    }
    rows = {row["feature_index"]: row for row in batch["features"]}
    assert set(rows) == set(np.flatnonzero(dense.any(0)).tolist())
    row, acts, W_dec_fd = rows[17], dense[:, 17], world.dictionary.W_dec_fo.numpy()
    assert set(row) == FIELDS
    scanned = np.asarray(world.index.tokens["scanned"])
    assert row["frac_nonzero"] == (acts[scanned] > 0).sum() / scanned.sum()
    assert sum(row["freq_hist_data_bar_heights"]) == (acts > 0).sum()
    assert len(row["freq_hist_data_bar_values"]) == 50
    assert sum(row["logits_hist_data_bar_heights"]) == len(world.tokenizer)
    assert row["vector"] == W_dec_fd[17].tolist()
    assert row["neuron_alignment_values"] == sorted(W_dec_fd[17].tolist(), reverse=True)[:3]
    assert row["neuron_alignment_l1"] == pytest.approx(np.abs(np.sort(W_dec_fd[17])[::-1][:3]) / np.abs(W_dec_fd[17]).sum())
    assert row["pos_values"] == sorted(row["pos_values"], reverse=True)


def test_activations_are_those_of_the_text(world, dense, folder):
    batch = json.loads((folder / "batch-0.json").read_text(encoding="utf-8"))
    row = next(row for row in batch["features"] if row["feature_index"] == 17)
    top = [a for a in row["activations"] if a["bin_min"] == -1]
    assert len(top) == 20
    assert {a["bin_contains"] for a in top} == {-1}
    assert top[0]["values"][top[0]["qualifying_token_index"]] == dense[:, 17].max() == top[0]["bin_max"]
    for activation in row["activations"]:
        value = activation["values"][activation["qualifying_token_index"]]
        assert len(activation["tokens"]) == len(activation["values"])
        if activation["bin_min"] >= 0:
            assert activation["bin_min"] <= value < activation["bin_max"]
    shares = {(a["bin_min"], a["bin_max"]): a["bin_contains"] for a in row["activations"] if a["bin_min"] >= 0}
    assert sum(shares.values()) == pytest.approx(1)
    for (low, high), share in shares.items():
        acts = dense[:, 17].astype(np.float16)
        assert share == pytest.approx(((acts >= low) & (acts < high) & (acts > 0)).sum() / (acts > 0).sum())


def test_features_that_never_fire_are_listed_as_skipped(dense, folder):
    skipped = json.loads((folder / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == np.flatnonzero(~dense.any(0)).tolist() != []


def test_what_is_read_is_written_again_field_for_field(folder, tmp_path):
    """Also what we do not write ourselves: other fields, other settings, numbers as they stand."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in folder.iterdir():
        value = json.loads(path.read_text(encoding="utf-8"))
        if "features" in value:
            value["features"][0] |= {"dfa_values": [0.1, -2.5e-7, float("nan")], "n_prompts_total": 24576, "dataset": "monology/pile — 🦓"}
            value["features"][0]["activations"][0] |= {"dfa_targetIndex": None, "loss_values": [1, 2.0, 3e300]}
        (theirs / path.name).write_text(json.dumps(value))
    (theirs / "batch-10.json").write_text((theirs / "batch-0.json").read_text())
    read = read_saedashboard(theirs)
    rewrite_saedashboard(read, tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(p.name for p in theirs.iterdir())
    for path in theirs.iterdir():
        mine, given = (json.loads((where / path.name).read_text(encoding="utf-8")) for where in (tmp_path / "ours", theirs))
        assert json.dumps(mine) == json.dumps(given)  # 1 and 1.0 are different, and NaN is itself


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"batch-0\.json"):
        read_saedashboard(tmp_path)
    batch = json.loads((folder / "batch-0.json").read_text(encoding="utf-8"))
    del batch["features"][0]["pos_str"]
    (tmp_path / "batch-0.json").write_text(json.dumps(batch))
    with pytest.raises(InputError, match="pos_str"):
        read_saedashboard(tmp_path)


def test_another_dictionary_is_refused(world, tmp_path):
    from feature_world import save_dictionary

    save_dictionary(tmp_path / "other", world.dictionary.W_enc_fd + 1, world.dictionary.b_enc_f, world.cache)
    config = ExportConfig(index=world.index.folder, out=tmp_path / "out", format="saedashboard", dictionary=tmp_path / "other")
    with pytest.raises(InputError, match="weights"):
        export_features(config)
    assert not (tmp_path / "out").exists()
