"""Dictionaries that are used a block of features at a time: in half precision, or left on the disk. Against formulas in float64."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import together

from sae.dictionaries import rows
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats import tensors
from sae.dictionaries.formats.saelens import files
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import AbsTopK, BareTopK, GroupMax, Threshold, TopK
from sae.dictionaries.source import sampled_crc32
from sae.disk import mapped
from sae.disk.writing import write_tensors
from sae.entries import Buffers
from sae.errors import InputError
from sae.training.start import part_of
from steering.intervention import DictionaryFeature, _feature_term

B, D, F, K = 9, 6, 60, 5
CHOICES = {"topk": TopK, "abstopk": AbsTopK, "bare topk": BareTopK, "groupmax": GroupMax}
SIZES = [1, 7, 12, 59, 60]
"""features in a block"""


def chosen(name: str, z: np.ndarray, k: int = K) -> np.ndarray:
    """The definition, with the lower feature first of equals."""
    acts = np.zeros_like(z)
    for row, out in zip(z, acts):
        groups = np.arange(len(z[0])).reshape(k, -1) if name == "groupmax" else [np.arange(len(z[0]))]
        for group in groups:
            size = np.abs(row[group]) if name == "abstopk" else row[group]
            kept = group[np.argsort(-size, kind="stable")[: 1 if name == "groupmax" else k]]
            out[kept] = row[kept] if name in ("abstopk", "bare topk") else np.maximum(row[kept], 0)
    return acts


def gated(name: str, z: np.ndarray, theta: np.ndarray) -> np.ndarray:
    if name in CHOICES:
        return chosen(name, z)
    return np.where(z > (theta if name == "jumprelu" else 0), z, 0)


@settings(deadline=None)
@given(st.data())
def test_any_blocks_give_the_choice_of_the_whole_row(data):
    """Exactly, among ties too."""
    name, k = data.draw(st.sampled_from(sorted(CHOICES))), data.draw(st.integers(1, 6))
    f = k * data.draw(st.integers(1, 8)) if name == "groupmax" else data.draw(st.integers(1, 30))
    z = np.array(data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=f, max_size=f), min_size=1, max_size=3)), np.float32)
    cuts = sorted(data.draw(st.sets(st.integers(0, f - 1))) | {0})
    blocks = [(low, torch.tensor(z[:, low:high])) for low, high in zip(cuts, [*cuts[1:], f])]
    gate = CHOICES[name](k)
    feature_bk, value_bk = gate.choose(blocks, f)
    expected = chosen(name, z, min(k, f))
    np.testing.assert_array_equal(gate(torch.tensor(z)), expected)
    np.testing.assert_array_equal(torch.zeros(z.shape).scatter_(-1, feature_bk, value_bk), expected)
    assert (feature_bk.diff(dim=-1) > 0).all()


def dictionary_of(name: str, dtype: torch.dtype, **rest) -> Dictionary:
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(F, D, generator=g).to(dtype) for _ in range(2))
    vectors = [torch.randn(size, generator=g).to(dtype) for size in (F, D)]
    theta = torch.rand(F, generator=g).to(dtype)
    gate = CHOICES[name](K) if name in CHOICES else Threshold(theta if name == "jumprelu" else None)
    return Dictionary(W_enc, vectors[0], W_dec, vectors[1], gate=gate, metadata={"site": "resid_post.0"}, **rest).requires_grad_(False)


@pytest.fixture
def wide(monkeypatch):
    """Every file stays on the disk, and so many features make a block."""

    def set_size(features: int) -> None:
        monkeypatch.setattr(tensors, "WIDE", 1)
        monkeypatch.setattr(rows, "BLOCK_BYTES", 4 * D * features)

    return set_size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", ["disk float32", "disk bfloat16", "memory bfloat16", "memory float16"])
@pytest.mark.parametrize("gate", ["relu", "jumprelu", *CHOICES])
def test_every_method_is_the_formula(tmp_path, wide, gate, where, size):
    place, dtype = where.split()
    made = dictionary_of(gate, getattr(torch, dtype))
    w = {name: getattr(made, name).double().numpy() for name in ("W_enc_fd", "b_enc_f", "W_dec_fo", "b_dec_o")}
    theta = made.gate.theta_f.double().numpy() if gate == "jumprelu" else np.zeros(F)
    made.save(tmp_path / "sae")
    wide(size)
    sae = Dictionary.load(tmp_path / "sae") if place == "disk" else made
    assert mapped.is_mapped(sae.W_enc_fd) == (place == "disk")
    assert (sae.features_at_once, sae.W_enc_fd.dtype, sae.dtype) == (size, getattr(torch, dtype), torch.float32)

    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    acts = gated(gate, x.double().numpy() @ w["W_enc_fd"].T + w["b_enc_f"], theta)
    close = dict(atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(sae.encode(x), acts, **close)
    np.testing.assert_allclose(sae.encode(x, Buffers()), acts, **close)
    np.testing.assert_allclose(sae.encode(x.view(3, 3, D)), acts.reshape(3, 3, F), **close)
    entries = sae.entries(x, Buffers())
    row, feature = np.nonzero(acts)
    np.testing.assert_array_equal(entries.row_n, row)
    np.testing.assert_array_equal(entries.feature_n, feature)
    np.testing.assert_allclose(entries.value_n, acts[row, feature], **close)
    np.testing.assert_allclose(sae.decode_entries(entries, x), acts @ w["W_dec_fo"] + w["b_dec_o"], **close)
    np.testing.assert_allclose(sae.activations(x, [31, 2, 31]), acts[:, [31, 2, 31]], **close)
    np.testing.assert_allclose(sae.decode(torch.tensor(acts)), acts @ w["W_dec_fo"] + w["b_dec_o"], **close)
    np.testing.assert_allclose(sae(x.view(3, 3, D)), (acts @ w["W_dec_fo"] + w["b_dec_o"]).reshape(3, 3, D), **close)
    np.testing.assert_allclose(sae.norms(), np.linalg.norm(w["W_dec_fo"], axis=1), **close)
    np.testing.assert_allclose(sae.rows([5, 0]), w["W_dec_fo"][[5, 0]])
    np.testing.assert_allclose(sae.encoder_rows([5, 0]), w["W_enc_fd"][[5, 0]])
    folded = sae.folded(2.0)
    assert folded.W_dec_fo.dtype == getattr(torch, dtype)
    rounding = torch.finfo(folded.W_dec_fo.dtype).eps
    if gate in ("relu", "jumprelu"):
        np.testing.assert_allclose(folded.norms(), 1, atol=2 * rounding)
    if gate == "relu":  # rounded again; of the others a rounding may change what fires
        np.testing.assert_allclose(folded(x), sae(2 * x) / 2, atol=100 * rounding)


def test_frames_and_a_bias_of_the_input(tmp_path, wide):
    made = dictionary_of("relu", torch.bfloat16, frame=Frame("layer_norm"), b_in_d=torch.ones(D).bfloat16() / 3)
    wide(7)
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1)) + 1
    mean, std = x.double().mean(1, keepdim=True), x.double().std(1, keepdim=True)
    seen = (x.double() - mean) / (std + 1e-5) - made.b_in_d.double()
    acts = (seen @ made.W_enc_fd.double().T + made.b_enc_f.double()).relu()
    expected = (acts @ made.W_dec_fo.double() + made.b_dec_o.double()) * std + mean
    torch.testing.assert_close(made(x).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.baseline(x).double(), made.b_dec_o.double() * std + mean, atol=1e-5, rtol=1e-5)


def test_the_gate_decides_in_float32(wide):
    """Just above a threshold, where bfloat16 cannot tell the two apart."""
    wide(1)
    theta = torch.ones(2, dtype=torch.bfloat16)
    W = torch.tensor([[1, 2**-10], [1, -(2**-10)]], dtype=torch.bfloat16)
    sae = Dictionary(W, torch.zeros(2).bfloat16(), W, torch.zeros(2).bfloat16(), gate=Threshold(theta)).requires_grad_(False)
    assert sae.encode(torch.ones(1, 2)).tolist() == [[1 + 2**-10, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["jumprelu", "topk"])
def test_processes_save_their_parts_as_the_bytes_of_the_whole(tmp_path, gate, dtype, monkeypatch):
    whole = dictionary_of(gate, dtype)
    expected = {"W_enc": whole.W_enc_fd.T, "b_enc": whole.b_enc_f, "W_dec": whole.W_dec_fo, "b_dec": whole.b_dec_o}
    expected |= {"threshold": whole.gate.theta_f} if gate == "jumprelu" else {}
    write_tensors(tmp_path / "expected.safetensors", expected)
    whole.save(tmp_path / "whole")
    monkeypatch.setattr(files, "BLOCK_BYTES", 2 * F * dtype.itemsize)  # two columns at a time

    def save_part(mesh):
        files.save(part_of(whole, mesh.every.part(F)).parts(), tmp_path / "parts", mesh.every)

    together(4, 1, save_part)
    for name in (files.WEIGHTS, files.CFG):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "parts" / files.WEIGHTS).read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def with_nan(folder, features) -> None:
    made = dictionary_of("jumprelu", torch.bfloat16)
    for W in (made.W_enc_fd, made.W_dec_fo):
        W[features] = torch.nan
    made.save(folder)


def test_a_chosen_feature_touches_only_its_rows(tmp_path, wide, capsys):
    """Everywhere else is NaN, which any use would refuse or carry on."""
    with_nan(tmp_path / "sae", [j for j in range(F) if j not in (4, 30)])
    wide(7)
    sae, whole = Dictionary.load(tmp_path / "sae"), dictionary_of("jumprelu", torch.bfloat16)
    assert "stays on the disk: rows are checked" in capsys.readouterr().err
    x = torch.randn(B, D)
    torch.testing.assert_close(sae.activations(x, [30, 4]), whole.encode(x)[:, [30, 4]])
    assert torch.equal(sae.rows([30]), whole.rows([30]))
    term = _feature_term(DictionaryFeature(sae, 30), torch.ones(1))
    assert torch.equal(term.direction, whole.rows([30])[0])
    assert torch.equal(term.read_d, whole.encoder_rows([30])[0])
    acts = torch.zeros(2, F)
    acts[0, 4] = acts[1, 30] = 2
    torch.testing.assert_close(sae.decode(acts), 2 * whole.rows([4, 30]) + whole.b_dec_o)
    for use in (lambda: sae.rows([4, 5]), lambda: sae.activations(x, [5]), lambda: sae.decode(torch.eye(F)[5:6])):
        with pytest.raises(InputError, match="the weights of feature 5 hold NaN or infinity; copy"):
            use()
    for use in (lambda: sae.encode(x), lambda: sae.entries(x, Buffers()), sae.norms):
        with pytest.raises(InputError, match="the weights of feature 0 hold NaN"):
            use()


def test_what_is_small_is_checked_when_it_is_opened(tmp_path, wide):
    with_nan(tmp_path / "small", [5])
    with pytest.raises(InputError, match="holds NaN or infinity"):
        Dictionary.load(tmp_path / "small")
    made = dictionary_of("jumprelu", torch.bfloat16)
    made.b_enc_f[3] = torch.inf
    made.save(tmp_path / "vector")
    wide(7)
    with pytest.raises(InputError, match=r"b_enc in .*vector holds NaN or infinity"):
        Dictionary.load(tmp_path / "vector")


def test_a_file_of_gemma_scope_stays_on_the_disk_too(tmp_path, wide):
    made = dictionary_of("jumprelu", torch.float32)
    w = {"W_enc": made.W_enc_fd.T, "b_enc": made.b_enc_f, "W_dec": made.W_dec_fo, "b_dec": made.b_dec_o, "threshold": made.gate.theta_f}
    np.savez(tmp_path / "params.npz", **{name: np.ascontiguousarray(tensor) for name, tensor in w.items()})
    wide(7)
    sae = Dictionary.load(tmp_path / "params.npz")
    assert mapped.is_mapped(sae.W_enc_fd)
    assert mapped.is_mapped(sae.W_dec_fo)
    x = torch.randn(B, D)
    torch.testing.assert_close(sae(x), made(x))


def test_memory_that_is_not_there_is_a_sentence(tmp_path, wide, monkeypatch):
    made = dictionary_of("topk", torch.float32)
    made.save(tmp_path / "sae")
    wide(7)
    monkeypatch.setattr(mapped, "free_memory", lambda: 100)
    with pytest.raises(InputError, match="GB of free memory for a folded dictionary, got"):
        Dictionary.load(tmp_path / "sae").folded(2.0)
    settings = json.loads((tmp_path / "sae" / "cfg.json").read_text()) | {"rescale_acts_by_decoder_norm": True}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"GB of free memory for the dictionary in .*sae, which is rewritten when it is opened"):
        Dictionary.load(tmp_path / "sae")


def test_the_sampled_checksum_knows_the_weights(tmp_path, wide):
    made = dictionary_of("jumprelu", torch.float32)
    made.save(tmp_path / "a")
    expected = sampled_crc32(made.parts())
    made.W_dec_fo *= 1.5
    made.save(tmp_path / "b")
    wide(7)
    assert sampled_crc32(Dictionary.load(tmp_path / "a").parts()) == expected != sampled_crc32(Dictionary.load(tmp_path / "b").parts())
