"""circuit-tracer's packed records, taken apart by hand."""

import errno
import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from sae.errors import InputError
from sae.features.exports.circuit_tracer import cantor_pair, write_circuit_tracer
from sae.features.exports.command import ExportConfig, export_features
from sae.features.exports.saedashboard import names_of

KEYS = {
    *("transcoder_id", "index", "examples_quantiles", "top_logits", "bottom_logits", "act_min", "act_max", "quantile_values"),
    *("histogram", "activation_frequency"),
}


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("circuit") / "out"
    export_features(ExportConfig(index=world.index.folder, out=out, format="circuit-tracer"))
    return out / "features"


def records(folder, layer):
    entry = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))[str(layer)]
    data = (folder / entry["filename"]).read_bytes()
    assert entry["offsets"][-1] == len(data)
    found = []
    for start, end in zip(entry["offsets"], entry["offsets"][1:]):
        (length,) = struct.unpack("<I", data[start : start + 4])
        assert length == end - start - 4
        found.append(json.loads(gzip.decompress(data[start + 4 : end])))
    return found


def test_every_record_stands_at_its_offset(world, dense, folder):
    found = records(folder, 0)
    assert len(found) == 40
    assert [record["index"] for record in found] == [cantor_pair(0, j) for j in range(40)]
    record, acts = found[17], dense[:, 17]
    assert set(record) == KEYS
    assert record["act_max"] == acts.max()
    assert record["activation_frequency"] == (acts > 0).sum() / world.index.info["tokens_scanned"]
    assert record["quantile_values"][50] == pytest.approx(np.median(acts[acts > 0]), rel=1e-3)
    assert sum(record["histogram"]) == (acts > 0).sum()
    top = record["examples_quantiles"][0]
    assert top["quantile_name"] == "Top"
    for group in record["examples_quantiles"]:
        for example in group["examples"]:
            assert set(example) == {"tokens", "tokens_acts_list", "train_token_ind", "is_repeated_datapoint"}
            assert len(example["tokens"]) == len(example["tokens_acts_list"])
            assert example["tokens_acts_list"][example["train_token_ind"]] > 0
    assert found[3]["examples_quantiles"] == []


def test_split_characters_are_escaped_as_the_viewer_joins_them(world, folder):
    tokens = [t for r in records(folder, 0) for g in r["examples_quantiles"] for e in g["examples"] for t in e["tokens"]]
    escaped = "".join(tokens)
    assert "\\xf0" in escaped  # 🦓 is several tokens
    joined = escaped.encode("latin-1", "backslashreplace").decode("unicode_escape").encode("latin-1", "ignore").decode("utf-8", "ignore")
    assert "🦓" in joined


def test_cantor_pairs_are_different_and_known():
    assert [cantor_pair(*pair) for pair in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))] == [0, 1, 2, 3, 4, 5]
    assert len({cantor_pair(layer, j) for layer in range(40) for j in range(40)}) == 1600


def test_layers_are_added_and_replaced(world, folder, tmp_path, monkeypatch):
    names = names_of(world.index)
    write_circuit_tracer(world.index, tmp_path, names)
    write_circuit_tracer(world.index, tmp_path, names._replace(layer=5))
    before = records(tmp_path / "features", 0)
    write_circuit_tracer(world.index, tmp_path, names)
    assert records(tmp_path / "features", 0) == before == records(folder, 0)
    assert [record["index"] for record in records(tmp_path / "features", 5)][:2] == [cantor_pair(5, 0), cantor_pair(5, 1)]
    assert {path.name for path in (tmp_path / "features").iterdir()} == {"index.json.gz", "layer_0.bin", "layer_5.bin"}

    def full(self, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = {path.name: path.read_bytes() for path in (tmp_path / "features").iterdir()}
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)  # as the list of layers is written, after the records
        with pytest.raises(InputError, match="the disk ran full"):
            write_circuit_tracer(world.index, tmp_path, names._replace(layer=5, set="other"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "features").iterdir()} == whole
    (tmp_path / "features" / "index.json.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"index\.json\.gz"):
        write_circuit_tracer(world.index, tmp_path, names)
