"""Opening a cache: what is in it, and what is said when it is damaged."""

import json
from contextlib import nullcontext

import pytest
import torch
from handmade_cache import SITE, write_cache
from safetensors.torch import load_file, save_file

from sae.activations.cache import ActivationCache, verify
from sae.dictionaries.dictionary import Dictionary
from sae.disk.checksum import crc32
from sae.errors import InputError


def test_reads_what_the_format_says(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [5, 7, 4], 6, "float16", held_out=(1,)))
    assert (cache.site, cache.d_in, cache.mean_squared_norm) == (SITE, 6, 1.0)
    assert (cache.rows("train"), cache.rows("held_out")) == (9, 7)
    activations, rows = cache.read(cache.shards("train")[1])
    assert activations.dtype == torch.float16
    assert rows.tolist() == [12, 13, 14, 15] == activations[:, 0].tolist()
    assert cache.verify() == []


def test_reading_is_memory_mapped(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [1 << 16], 128))  # 32 MiB

    def resident() -> int:
        return int(open("/proc/self/statm").read().split()[1]) * 4096

    before = resident()
    activations, _ = cache.read(cache.shards("train")[0])
    assert resident() - before < 4 << 20
    assert activations[-1, 0] == (1 << 16) - 1


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_a_truncated_shard_is_named_and_the_rest_is_readable(tmp_path, kept_bytes, capsys):
    write_cache(tmp_path, [5, 7, 4])
    path = tmp_path / SITE / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(InputError, match=r"00001\.safetensors.*skip_damaged"):
        ActivationCache.open(tmp_path)
    cache = ActivationCache.open(tmp_path, skip_damaged=True)
    assert "00001.safetensors" in capsys.readouterr().err
    assert [shard.name for shard in cache.shards("train")] == ["00000", "00002"]
    assert cache.verify() == [f"{SITE}/00001.safetensors"]


def test_a_missing_shard_is_named(tmp_path):
    write_cache(tmp_path, [5, 7])
    (tmp_path / SITE / "00000.safetensors").unlink()
    with pytest.raises(InputError, match=r"00000\.safetensors.*missing"):
        ActivationCache.open(tmp_path)


@pytest.mark.parametrize("where", [3, 30, -1])  # the length of the header, the header, the numbers
def test_a_flipped_bit_is_found(tmp_path, where, capsys):
    write_cache(tmp_path, [5, 7])
    path = tmp_path / SITE / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)
    assert verify(tmp_path) == [f"{SITE}/00001.safetensors"]
    cache = ActivationCache.open(tmp_path, skip_damaged=True)
    assert [shard.name for shard in cache.shards("train")] == ["00000"]
    assert "00001.safetensors" in capsys.readouterr().err
    if where >= 0:  # cheap to see, so seen without reading everything
        with pytest.raises(InputError, match=r"00001\.safetensors"):
            ActivationCache.open(tmp_path)


def test_a_flipped_number_is_found_when_asked_for(tmp_path):
    write_cache(tmp_path, [5, 7])
    path = tmp_path / SITE / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    ActivationCache.open(tmp_path)
    with pytest.raises(InputError, match=r"00001\.safetensors, but its checksum is wrong"):
        ActivationCache.open(tmp_path, verify=True)


@pytest.mark.parametrize("position", [-1, 12, 2**40, -(2**63)])
def test_a_row_of_no_token_is_refused_when_read(tmp_path, position):
    write_cache(tmp_path, [5, 7])
    path = tmp_path / SITE / "00001.safetensors"
    tensors = load_file(path)
    tensors["rows"][3] = position
    save_file(tensors, path)
    cache = ActivationCache.open(tmp_path)
    for read in (cache.read, cache.positions):
        read(cache.shards("train")[0])
        with pytest.raises(InputError, match=rf"rows in .*00001.safetensors from 0 to 11.*{position}"):
            read(cache.shards("train")[1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m["shards"].pop(), "as its manifest counts, but it lists"),
        (lambda m: m["shards"][0]["files"].clear(), "not at resid_post.1"),
        (lambda m: m["shards"][0].update(name="../../secret"), "'shards.0.name'"),
        (lambda m: m["sites"].update({"../x.1": m["sites"][SITE]}), "'sites"),
        (lambda m: m["sites"][SITE].update(mean_squared_norm=float("nan")), "mean_squared_norm' should be a finite number"),
        (lambda m: m["counts"]["rows"].update(train=None), "'counts.rows.train' should be a valid integer"),
        (lambda m: m.pop("labels"), "'labels' is missing"),
        (lambda m: m.update(shards=None), "'shards' should be a valid list"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, change, sentence):
    write_cache(tmp_path, [5, 7])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=sentence):
        ActivationCache.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "numbers", "sentence"),
    [
        ("ids", [-1] + [0] * 11, "ids in .* from 0"),
        ("sequence_starts", [0, 13], "sequence_starts in .* rise from 0 to 12"),
        ("sequence_document", [1], "sequence_document in .* from 0 to 0"),
        ("document_label", [0], "document_label in .* from -1 to -1"),
        ("sequence_split", [2], "sequence_split in .* from 0 to 1"),
        ("ids", [0] * 11, "rise from 0 to 11"),
    ],
)
def test_tokens_that_lead_nowhere_are_refused(tmp_path, name, numbers, sentence):
    write_cache(tmp_path, [5, 7])
    path, manifest = tmp_path / "tokens" / "00000.safetensors", tmp_path / "manifest.json"
    before, size = crc32(path), path.stat().st_size
    tensors = load_file(path)
    save_file(tensors | {name: torch.tensor(numbers, dtype=tensors[name].dtype)}, path)
    text = manifest.read_text().replace(before, crc32(path)).replace(f'"bytes": {size}', f'"bytes": {path.stat().st_size}')
    manifest.write_text(text)
    with pytest.raises(InputError, match=sentence):
        _ = ActivationCache.open(tmp_path).tokens


def test_damaged_tokens_are_named_and_leave_the_activations_readable(tmp_path):
    write_cache(tmp_path, [5])
    path = tmp_path / "tokens" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"tokens/00000\.safetensors"):
        ActivationCache.open(tmp_path)
    cache = ActivationCache.open(tmp_path, skip_damaged=True)
    assert cache.rows("train") == 5
    with pytest.raises(InputError, match=r"tokens/00000\.safetensors"):
        _ = cache.tokens


def test_a_foreign_or_unfinished_folder_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        ActivationCache.open(tmp_path)
    (tmp_path / "harvest.json").write_text("{}")
    with pytest.raises(InputError, match="not finished"):
        ActivationCache.open(tmp_path)
    write_cache(tmp_path, [5])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(InputError, match=r"version 1.* is 2"):
        ActivationCache.open(tmp_path)


def test_another_site_width_or_model_is_refused(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [5], 6))
    with pytest.raises(InputError, match=r"resid_post\.1.*resid_post\.0"):
        ActivationCache.open(tmp_path, "resid_post.0")
    for d, site, message in (
        (6, "resid_post.1", None),
        (7, "resid_post.1", r"width 7.*6"),
        (6, "resid_post.0", r"resid_post\.0.*resid_post\.1"),
    ):
        dictionary = Dictionary.initial(d, 3, seed=0)
        dictionary.metadata = {"site": site}
        with pytest.raises(InputError, match=message) if message else nullcontext():
            cache.require_dictionary(dictionary, named=False)


def test_a_dictionary_that_names_no_site_takes_the_only_one(tmp_path):
    one, two = write_cache(tmp_path / "one", [5], 6), write_cache(tmp_path / "two", [5], 6, more_sites={"resid_mid.1": 6})
    dictionary = Dictionary.initial(6, 3, seed=0)
    assert ActivationCache.of_dictionary(one, dictionary, named=False).site == SITE
    with pytest.raises(InputError, match=r"does not name its site, and .* has several, resid_post\.1, resid_mid\.1"):
        ActivationCache.of_dictionary(two, dictionary, named=False)
    dictionary.metadata = {"site": "resid_mid.1"}
    assert ActivationCache.of_dictionary(two, dictionary, named=False).site == "resid_mid.1"


def test_a_transcoder_of_another_width_is_refused(tmp_path):
    cache = ActivationCache.open(write_cache(tmp_path, [5], 6, more_sites={"mlp_out.1": 4}), SITE)
    W_enc_fd = torch.ones(3, 6)
    for d_out, message in ((4, None), (6, "writes 4 values at mlp_out.1.*got one that writes 6")):
        dictionary = Dictionary.autoencoder(W_enc_fd, torch.zeros(3), torch.ones(3, d_out), torch.zeros(d_out))
        dictionary.metadata = {"site": SITE, "site_out": "mlp_out.1"}
        with pytest.raises(InputError, match=message) if message else nullcontext():
            assert cache.target_of(dictionary).site == "mlp_out.1"
