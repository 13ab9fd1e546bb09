"""An exported folder opens with `datasets` and holds what the cache holds."""

import datasets
import numpy as np
import pytest
import torch
from handmade_cache import write_cache
from live_world import SITE, make_world

from sae.activations.cache import ActivationCache
from sae.activations.export import ExportConfig, export_cache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.imports.command import ImportConfig, import_activations
from sae.disk.checksum import crc32
from sae.errors import InputError


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_row_comes_back_with_its_token(tmp_path, dtype):
    options = make_world(tmp_path)
    cache = ActivationCache.open(harvest(HarvestConfig(**{**options, "out": tmp_path / "cache", "dtype": dtype, "shard_tokens": 150})))
    dataset = datasets.load_from_disk(str(export_cache(ExportConfig(cache=cache.folder, out=tmp_path / "export"))))
    stored = [(split, *cache.read(shard)) for split in ("train", "held_out") for shard in cache.shards(split)]
    positions = torch.cat([rows for _, _, rows in stored])
    assert dataset["token_position"][:] == positions.tolist()
    assert dataset["split"][:] == [split for split, _, rows in stored for _ in rows]
    exact = torch.cat([x for _, x, _ in stored]).float()
    assert torch.equal(dataset.with_format("torch")["activations"][:].float(), exact)
    assert dataset.features["activations"].feature.dtype == ("float16" if dtype == "float16" else "float32")
    tokens = cache.tokens
    for row in dataset.select(range(0, len(dataset), 97)):
        assert row["token_id"] == tokens.ids[row["token_position"]]
        (sequence,) = np.flatnonzero(
            (tokens.sequence_starts[:-1] <= row["token_position"]) & (row["token_position"] < tokens.sequence_starts[1:])
        )
        assert row["document"] == tokens.sequence_document[sequence]
        assert row["label"] is None
    assert cache.site == SITE
    assert not list(tmp_path.glob(".export*"))


def test_labels_and_one_split(tmp_path):
    (tmp_path / "text.jsonl").write_text("")
    folder = write_cache(tmp_path / "c", [30, 20], held_out=(1,))
    from safetensors.torch import load_file, save_file

    path, manifest = folder / "tokens" / "00000.safetensors", folder / "manifest.json"
    before = crc32(path)
    save_file({**load_file(path), "document_label": torch.tensor([0], dtype=torch.int32)}, path)
    manifest.write_text(manifest.read_text().replace('"labels": []', '"labels": ["prose"]').replace(before, crc32(path)))
    dataset = datasets.load_from_disk(str(export_cache(ExportConfig(cache=folder, out=tmp_path / "e", splits=("held_out",)))))
    assert dataset["token_id"][:] == list(range(30, 50))
    assert set(dataset["label"][:]) == {"prose"}
    assert [row[0] for row in dataset["activations"][:]] == list(range(30, 50))


def test_what_an_import_does_not_know_is_null(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(150, dtype=np.float32).reshape(50, 3))
    out = import_activations(ImportConfig(source=(tmp_path / "x.npy",), out=tmp_path / "c", site="resid_post.0"))
    dataset = datasets.load_from_disk(str(export_cache(ExportConfig(cache=out, out=tmp_path / "e"))))
    assert sorted(row[0] for row in dataset["activations"][:]) == list(range(0, 150, 3))
    assert set(dataset["token_id"][:]) == set(dataset["document"][:]) == {None}


def test_unusable_requests_are_refused(tmp_path):
    folder = write_cache(tmp_path / "c", [10])
    (tmp_path / "there").mkdir()
    for changes, message in ((dict(out=tmp_path / "there"), "exists"), (dict(splits=("held_out",)), "none"), (dict(splits=()), "--splits")):
        with pytest.raises(InputError, match=message):
            export_cache(ExportConfig(**{"cache": folder, "out": tmp_path / "e", **changes}))
    assert not (tmp_path / "e").exists()
