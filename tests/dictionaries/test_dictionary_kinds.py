"""Every kind of dictionary against its formula in numpy's float64, method by method."""

import numpy as np
import pytest
import torch
from encoders import each

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.frames import Frame
from sae.dictionaries.gates import AbsTopK, BareTopK, GroupMax, Threshold, TopK
from sae.entries import Buffers
from sae.errors import InputError

B, D, F, OUT = 7, 6, 20, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, D)) + 1
THETA = np.abs(RNG.normal(size=F))
GATES = {"relu": Threshold(), "jumprelu": Threshold(torch.tensor(THETA)), "topk": TopK(4), "abstopk": AbsTopK(4)}
GATES |= {"bare topk": BareTopK(4), "groupmax": GroupMax(4)}


def gated(name: str, z: np.ndarray) -> np.ndarray:
    order = np.argsort(-(np.abs(z) if name == "abstopk" else z), axis=1)[:, :4]
    chosen = np.zeros(z.shape, bool)
    np.put_along_axis(chosen, order, True, 1)
    return {
        "relu": np.maximum(z, 0),
        "jumprelu": np.where(z > THETA, z, 0),
        "topk": np.where(chosen, np.maximum(z, 0), 0),
        "abstopk": np.where(chosen, z, 0),
        "bare topk": np.where(chosen, z, 0),
        "groupmax": np.where(z == z.reshape(len(z), 4, -1).max(2).repeat(F // 4, 1), np.maximum(z, 0), 0),
    }[name]


def weights(width: int = D) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, width), "b_dec": (width,), "b_in": (D,), "W_skip": (width, D)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def made(w: dict[str, np.ndarray], gate: str, **rest) -> Dictionary:
    tensors = {name: torch.tensor(value) for name, value in w.items()}
    return Dictionary(*(tensors[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")), gate=GATES[gate], **rest).requires_grad_(False)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_as_autoencoder_and_as_skip_transcoder(gate):
    w = weights()
    sae = made(w, gate, b_in_d=torch.tensor(w["b_in"]), metadata={"site": "resid_post.0"})
    acts = gated(gate, (X - w["b_in"]) @ w["W_enc"].T + w["b_enc"])
    x = torch.tensor(X)
    np.testing.assert_allclose(sae.encode(x), acts, atol=1e-12)
    np.testing.assert_allclose(sae(x), acts @ w["W_dec"] + w["b_dec"], atol=1e-12)
    np.testing.assert_allclose(sae.activations(x[None], [3, 0, 19])[0], acts[:, [3, 0, 19]], atol=1e-12)
    entries = sae.entries(x, Buffers())
    rows, features = np.nonzero(acts)
    np.testing.assert_array_equal(entries.row_n, rows)
    np.testing.assert_array_equal(entries.feature_n, features)
    np.testing.assert_allclose(entries.value_n, acts[rows, features], atol=1e-12)
    np.testing.assert_allclose(sae.decode_entries(entries, x), acts @ w["W_dec"] + w["b_dec"], atol=1e-12)
    assert not sae.is_transcoder

    w = weights(OUT)
    transcoder = made(w, gate, W_skip_od=torch.tensor(w["W_skip"]), metadata={"site": "mlp_in.0", "site_out": "mlp_out.0"})
    acts = gated(gate, X @ w["W_enc"].T + w["b_enc"])
    written = acts @ w["W_dec"] + w["b_dec"] + X @ w["W_skip"].T
    np.testing.assert_allclose(transcoder(x), written, atol=1e-12)
    for rows in (slice(None), slice(1)):
        np.testing.assert_allclose(transcoder.decode_entries(transcoder.entries(x[rows], Buffers()), x[rows]), written[rows], atol=1e-12)
    assert transcoder.is_transcoder
    assert (transcoder.d_in, transcoder.d_out) == (D, OUT)
    with pytest.raises(InputError, match="give decode both"):
        transcoder.decode(transcoder.encode(x))


@pytest.mark.parametrize("method", each("onednn", "bfloat16", "int8"))
@pytest.mark.parametrize("gate", GATES)
def test_entries_by_another_encoder(gate, method):
    w = weights()
    sae = made(w, gate, b_in_d=torch.tensor(w["b_in"])).float()
    x = torch.tensor(X, dtype=torch.float32)
    if gate not in ("relu", "jumprelu", "topk"):
        assert sae.encoder(x) is None
        with pytest.raises(InputError, match=f"expected ReLU, JumpReLU or TopK in float32 for the encoder {method}, got the gate"):
            sae.encoder(x, method)
        return
    acts = gated(gate, (X - w["b_in"]) @ w["W_enc"].T + w["b_enc"])
    entries = sae.entries(x, Buffers(), sae.encoder(x, method))
    rows, features = np.nonzero(acts)
    np.testing.assert_array_equal(entries.row_n, rows)
    np.testing.assert_array_equal(entries.feature_n, features)
    np.testing.assert_allclose(entries.value_n, acts[rows, features], rtol=1e-5, atol=1e-6)


def test_encoders_for_other_weights():
    sae = made(weights(), "relu")
    assert sae.encoder(torch.tensor(X)) is None
    with pytest.raises(InputError, match=r"got weights in torch\.float64 or on the disk; take auto or product"):
        sae.encoder(torch.tensor(X), "bfloat16")


@pytest.mark.parametrize("gate", GATES)
def test_frames(gate):
    w = weights()
    for kind in ("constant_norm_rescale", "layer_norm", "centred"):
        sae = made(w, gate, b_in_d=torch.tensor(w["b_in"]), frame=Frame(kind), metadata={"site": "resid_post.0"})
        if kind == "constant_norm_rescale":
            unit, shift = np.linalg.norm(X, axis=1, keepdims=True) / D**0.5, 0
            seen = X / unit
        elif kind == "centred":
            unit, shift = np.ones((B, 1)), X.mean(1, keepdims=True)
            seen = X - shift
        else:
            shift = X.mean(1, keepdims=True)
            unit = (X - shift).std(1, ddof=1, keepdims=True)
            seen = (X - shift) / (unit + 1e-5)
        acts = gated(gate, (seen - w["b_in"]) @ w["W_enc"].T + w["b_enc"])
        x = torch.tensor(X)
        np.testing.assert_allclose(sae.encode(x), acts, atol=1e-12)
        np.testing.assert_allclose(sae(x), (acts @ w["W_dec"] + w["b_dec"]) * unit + shift, atol=1e-12)
        np.testing.assert_allclose(sae.unit(x), unit, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_folding_changes_no_output(gate):
    w = weights(OUT)
    scale_in, scale_out = 3.0, 0.5
    trained = made(
        w, gate, b_in_d=torch.tensor(w["b_in"]), W_skip_od=torch.tensor(w["W_skip"]), metadata={"site": "mlp_in.0", "site_out": "mlp_out.0"}
    )
    folded = trained.folded(scale_in, scale_out)
    x = torch.tensor(X)
    np.testing.assert_allclose(folded(x), trained(x * scale_in) / scale_out, atol=1e-12)
    norms = folded.norms()
    if GATES[gate].scaled(torch.ones(1)):
        np.testing.assert_allclose(norms, 1, atol=1e-12)
    else:  # unit rows would make a TopK choose other features
        np.testing.assert_allclose(norms, trained.norms() / scale_out, atol=1e-12)
