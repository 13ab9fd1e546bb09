"""An index of every kind of dictionary against encoding all cached activations at once."""

import json

import numpy as np
import pytest
import torch
from encoders import HERE
from feature_world import VOCABULARY

from sae.activations.cache import ActivationCache
from sae.dictionaries import rows
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats import tensors
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import AbsTopK, GroupMax, Threshold, TopK
from sae.errors import InputError
from sae.features.index import build
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.lens import folded_unembedding
from sae.features.index.merge import MergeConfig, merge_indexes
from sae.features.index.reader import FeatureIndex
from sae.features.pages.feature import FeatureView
from sae.model.language_model import LanguageModel

F = 24
KINDS = {
    "jumprelu": dict(gate=Threshold(torch.linspace(0, 0.6, F))),
    "topk": dict(gate=TopK(3)),
    "abstopk": dict(gate=AbsTopK(3)),
    "groupmax": dict(gate=GroupMax(3)),
    "layer norm": dict(frame=Frame("layer_norm")),
    "skip": dict(W_skip_od=torch.eye(VOCABULARY) / 3),
}


def made(world, **rest):
    g = torch.Generator().manual_seed(0)
    W_enc_fd, W_dec_fd = torch.randn(2, F, VOCABULARY, generator=g)
    model = json.loads((world.cache / "manifest.json").read_text())["model"]
    metadata = {"model_name": model["name"], "model_fingerprint": model["fingerprint"], "site": "resid_pre.0"}
    return Dictionary(W_enc_fd, torch.full((F,), -0.3), W_dec_fd / 9, torch.zeros(VOCABULARY), metadata=metadata, **rest).requires_grad_(
        False
    )


def cached(world):
    cache = ActivationCache.open(world.cache, "resid_pre.0")
    parts = [cache.read(shard) for split in ("train", "held_out") for shard in cache.shards(split)]
    return torch.cat([x for x, _ in parts]), np.concatenate([rows for _, rows in parts])


def test_a_dictionary_of_another_format(world, tmp_path, capsys):
    """Named by its folder, the index finds it again, and no other in its place."""
    dictionary = made(world, gate=Threshold(torch.linspace(0, 0.6, F)))
    w = {"W_enc": dictionary.W_enc_fd.T, "b_enc": dictionary.b_enc_f, "W_dec": dictionary.W_dec_fo, "b_dec": dictionary.b_dec_o}
    w = {name: tensor.numpy() for name, tensor in (w | {"threshold": dictionary.gate.theta_f}).items()}
    source = tmp_path / "scope"
    source.mkdir()
    np.savez(source / "params.npz", **w)
    config = IndexConfig(cache=world.cache, dictionary=str(source), out=tmp_path / "index", device="cpu", model=str(world.model))
    index = FeatureIndex.open(build_index(config))
    assert "does not name its site; it is taken to be the cache's, resid_pre.0" in capsys.readouterr().err
    dictionary.save(tmp_path / "sae")
    other = FeatureIndex.open(build_index(IndexConfig(cache=world.cache, dictionary=tmp_path / "sae", out=tmp_path / "b", device="cpu")))
    for j in range(F):
        np.testing.assert_array_equal(index.feature(j).values, other.feature(j).values)
    assert torch.equal(index.dictionary().W_dec_fo, dictionary.W_dec_fo)
    assert torch.equal(index.dictionary(f"{source}/params.npz").W_dec_fo, dictionary.W_dec_fo)
    np.savez(source / "params.npz", **(w | {"b_enc": w["b_enc"] + 1}))
    with pytest.raises(InputError, match=r"but the weights in .*scope differ; index it again"):
        index.dictionary()


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "skip"])
def test_a_screened_index_has_the_same_activations(world, tmp_path, kind, capsys):
    made(world, **KINDS[kind]).save(tmp_path / "sae")
    indexes = {}
    screened = [encoder for encoder in ("bfloat16", "int8") if encoder in HERE]
    for encoder in ("auto", "product", *screened):
        config = IndexConfig(cache=world.cache, dictionary=tmp_path / "sae", out=tmp_path / encoder, device="cpu", encoder=encoder)
        indexes[encoder] = FeatureIndex.open(build_index(config))
        said = f"encoded by {encoder}; name it with --encoder to repeat this index bit for bit" in capsys.readouterr().out
        assert said == (encoder not in ("auto", "product"))
    names = [index.info["encoder"] for index in indexes.values()]
    assert names == ["product", "product", *screened], "so few rows are not worth a measurement"
    for j in range(F):
        found = [indexes[encoder].feature(j) for encoder in ("product", *screened)]
        for one in found[1:]:
            np.testing.assert_array_equal(one.positions, found[0].positions)
            np.testing.assert_allclose(one.values, found[0].values, rtol=2e-3)
        for one in found[2:]:
            np.testing.assert_array_equal(one.values, found[1].values)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(world, tmp_path, kind):
    dictionary = made(world, **KINDS[kind])
    dictionary.save(tmp_path / "sae")
    config = dict(cache=world.cache, dictionary=tmp_path / "sae", device="cpu")
    index = FeatureIndex.open(build_index(IndexConfig(out=tmp_path / "index", **config)))
    x, tokens = cached(world)
    acts = dictionary.encode(x).numpy()
    for j in range(F):
        fires = np.flatnonzero(acts[:, j])
        order = np.argsort(tokens[fires])
        np.testing.assert_array_equal(index.feature(j).positions, tokens[fires][order])
        np.testing.assert_array_equal(index.feature(j).values, np.abs(acts[fires, j][order]).astype(np.float16))
    wide, x64 = dictionary.double(), x.double()
    with torch.no_grad():
        error = (x64 - wide(x64)).square().sum()
        centred = (x64 - x64.mean(0)).square().sum()
        assert index.info["fvu"] == pytest.approx(float(error / centred), rel=1e-4)
        codes = wide.encode(x64)
        for j in (0, 7):
            without = codes.clone()
            without[:, j] = 0
            rise = ((x64 - wide.decode(without, x64)).square().sum() - error) / centred
            assert index.columns["fvu_contribution"][j] == pytest.approx(float(rise), rel=1e-3, abs=1e-6)
    dictionary.float()

    j = int(np.argmax(index.columns["count"]))
    if kind == "abstopk":
        np.testing.assert_allclose(index.columns["negative_share"], [(a[a != 0] < 0).mean() for a in acts.T], atol=1e-6)
        shown = {context.position: context.value for context in index.top_contexts(j)}
        assert {p: np.float16(acts[tokens == p, j][0]) for p in shown} == pytest.approx(shown)
        page = FeatureView(index, j)._repr_html_()
        assert (' m c"' in page) == any(value < 0 for value in shown.values())
        assert "of activations, in blue" in page
    parts = [build_index(IndexConfig(out=tmp_path / f"part{i}", part=f"{i}/2", **config)) for i in (1, 2)]
    merge_indexes(MergeConfig(parts=tuple(parts), out=tmp_path / "merged"))
    for name in ("records", "columns", "details"):
        assert (tmp_path / "merged" / f"{name}.safetensors").read_bytes() == (tmp_path / "index" / f"{name}.safetensors").read_bytes()


def test_a_feature_that_is_strongest_below_zero(world, tmp_path):
    """Its maximum and what it promotes have that sign."""
    dictionary = made(world, gate=AbsTopK(3))
    dictionary.save(tmp_path / "sae")
    index = FeatureIndex.open(build_index(IndexConfig(cache=world.cache, dictionary=tmp_path / "sae", out=tmp_path / "index")))
    acts_nf = dictionary.encode(cached(world)[0]).numpy()
    strongest_f = acts_nf[np.abs(acts_nf).argmax(0), np.arange(F)]
    assert strongest_f.min() < 0 < strongest_f.max()
    np.testing.assert_allclose([index.feature(j).maximum for j in range(F)], strongest_f, rtol=1e-3)

    W_U_vd, _ = folded_unembedding(LanguageModel.load(str(world.model), device="cpu"))
    W_U_vd = W_U_vd[: len(world.tokenizer)]
    W_U_vd = W_U_vd - W_U_vd.mean(0)
    lens_fv = (torch.from_numpy(np.sign(strongest_f))[:, None] * dictionary.W_dec_fo) @ W_U_vd.T
    ranks = {}
    for j in range(F):
        for bottom in (False, True):
            expected = lens_fv[j].topk(20, largest=not bottom)
            tokens, values = zip(*index.lens_tokens(j, 20, bottom=bottom))
            assert list(tokens) == expected.indices.tolist()
            np.testing.assert_allclose(values, expected.values, rtol=1e-3, atol=1e-5)
        edges, counts = index.lens_histogram(j)
        low, high = lens_fv[j].min().item(), lens_fv[j].max().item()
        np.testing.assert_allclose(edges[[0, -1]], [low, high], rtol=1e-3)
        assert np.abs(counts - np.histogram(lens_fv[j].numpy(), 50, (low, high))[0]).sum() <= 4, "rounding at an edge"
        ranks[j] = lens_fv[j].topk(20).indices.tolist()
    j = int(strongest_f.argmin())
    word = next(t for t in map(index.vocabulary.spelling, ranks[j]) if t.strip().isalpha())
    same = [t for t in range(len(world.tokenizer)) if index.vocabulary.spelling(t).strip().casefold() == word.strip().casefold()]
    expected = {k: 1 + min(rank.index(t) for t in same if t in rank) for k, rank in ranks.items() if set(same) & set(rank)}
    assert {hit.feature: hit.lens_rank for hit in index.promotes(word.strip(), F)} == expected
    for hit in index.promotes(word.strip(), F):
        assert hit.value == pytest.approx(float(lens_fv[hit.feature, hit.token]), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_by_blocks_of_a_file_on_the_disk(world, tmp_path, monkeypatch, capsys, kind):
    """The weights in bfloat16, five features at a time, against the same numbers as float32 in memory."""
    dictionary = made(world, **KINDS[kind]).bfloat16()
    dictionary.save(tmp_path / "half")
    dictionary.float().save(tmp_path / "sae")
    config = dict(cache=world.cache, device="cpu")
    plain = FeatureIndex.open(build_index(IndexConfig(out=tmp_path / "plain", dictionary=tmp_path / "sae", **config)))
    monkeypatch.setattr(tensors, "WIDE", 1)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 4 * VOCABULARY * 5)
    index = FeatureIndex.open(build_index(IndexConfig(out=tmp_path / "index", dictionary=tmp_path / "half", **config)))
    for name in ("offsets", "positions", "values"):
        np.testing.assert_allclose(getattr(index, name), getattr(plain, name), rtol=2e-3)
    for name in plain.columns:
        if name.endswith("_ids"):  # of equal or nearly equal values
            continue
        np.testing.assert_allclose(index.columns[name], plain.columns[name], rtol=1e-2, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(index.details["neighbour_cosines"], plain.details["neighbour_cosines"], atol=1e-5)
    assert index.info["dictionary_crc32_of"] == "samples"
    torch.testing.assert_close(index.dictionary().rows([3]), dictionary.rows([3]))
    with pytest.raises(InputError, match=r"the weights in .*differ; index it again"):
        index.dictionary(tmp_path / "sae")
    assert plain.dictionary().d_sae == F  # stays on the disk now, but was in memory when it was indexed
    capsys.readouterr()
    monkeypatch.setattr(build, "MOST_OPERATIONS", 1)
    index = FeatureIndex.open(build_index(IndexConfig(out=tmp_path / "index", dictionary=tmp_path / "half", **config)))
    said = capsys.readouterr().err
    assert "the index has no logit lens: for 24 features it takes" in said
    assert "the index has no neighbours by cosine: for 24 features it takes 5e+05 operations, which is left to a GPU" in said
    assert "which is left to a GPU (--device cuda)" in FeatureView(index, 3)._repr_html_()


def test_a_transcoder_needs_the_site_it_writes(world, tmp_path):
    dictionary = made(world)
    dictionary.metadata["site_out"] = "mlp_out.0"
    dictionary.save(tmp_path / "sae")
    with pytest.raises(InputError, match=r"--sites resid_pre\.0 mlp_out\.0"):
        build_index(IndexConfig(cache=world.cache, dictionary=tmp_path / "sae", out=tmp_path / "index", device="cpu"))
