"""Steps whose active entries are found by screening: the same gradients as by the float32 product, for every kind with a rule."""

import pytest
import torch
from encoders import HERE

from sae.errors import InputError
from sae.kinds import KINDS, JumpReLU, Matryoshka, Now
from sae.objective import Weights, Workspace, fast, objective

D, F, B = 24, 1500, 300
ENCODERS = HERE[1:]


def kind_of(name):
    if name == "jumprelu":
        return JumpReLU(loss="tanh", bandwidth=0.2, threshold=0.3, warmup=0.0)
    if name == "matryoshka":
        return Matryoshka(k=(9,), prefixes=(100, 700), aux_k=3)
    return KINDS[name](l1=(0.7,), l1_warmup=0.0) if name in ("relu", "p-annealing", "gated") else KINDS[name](k=(9,))


def problem(bias=-8.0):
    generator = torch.Generator().manual_seed(0)
    x_bd, W_enc_fd, W_dec_fd = (torch.randn(n, D, generator=generator) for n in (B, F, F))
    W_dec_fd /= W_dec_fd.norm(dim=-1, keepdim=True)
    b_enc_f = torch.randn(F, generator=generator) * 0.3 + bias
    return x_bd, Weights(W_enc_fd, b_enc_f, W_dec_fd, torch.randn(D, generator=generator) * 0.3)


def step_of(kind, encoder, path="auto", bias=-8.0, transcodes=False):
    x_bd, weights = problem(bias)
    dead_f = torch.arange(F) % 5 == 0
    now = Now(60, 100, D, dead_f, kind.state(), 1)
    own = kind.own(D, F)
    y_bo = x_bd.flip(0) if transcodes else None
    return objective(x_bd, weights, kind.goal(kind.values[0], now), path, Workspace(encoder=encoder), y_bo=y_bo, own=own)


def gradients(step):
    return {**dict(zip(Weights._fields, step.gradients)), **step.own_gradients}


@pytest.mark.parametrize("transcodes", [False, True], ids=["autoencoder", "transcoder"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "abstopk"])
def test_every_kind_has_the_gradients_of_the_formula(name, transcodes, monkeypatch):
    monkeypatch.setattr(fast, "CHUNK_BYTES", 4 * F * 77)  # several chunks
    kind = kind_of(name)
    judge = step_of(kind, "product", "reference", transcodes=transcodes)
    steps = {encoder: step_of(kind, encoder, transcodes=transcodes) for encoder in ENCODERS}
    tolerance = 1e-3 if name == "p-annealing" else 1e-4  # the slope of v^p has no bound at 0
    for encoder, step in steps.items():
        assert float(step.sparse_share) == 1
        assert torch.equal(step.fired_f, judge.fired_f), encoder
        assert torch.allclose(step.loss.double(), judge.loss, rtol=1e-5)
        for field, gradient in gradients(step).items():
            theirs = gradients(judge)[field]
            assert (gradient - theirs).norm() <= tolerance * theirs.norm(), (encoder, field)
    one, other = gradients(steps["bfloat16"]), gradients(steps[ENCODERS[-1]])
    assert all(torch.equal(one[field], other[field]) for field in one), "the precision of the screening changes no bit"


def test_dense_rows_go_through_the_product():
    """As early in training: the same bits as without an encoder."""
    kind = kind_of("relu")
    product, screened = (gradients(step_of(kind, encoder, bias=0.0)) for encoder in ("product", "bfloat16"))
    assert all(torch.equal(product[field], screened[field]) for field in product)


def test_an_encoder_that_would_not_be_used_is_refused():
    kind = kind_of("relu")
    with pytest.raises(InputError, match="expected the backend auto or sparse for the encoder bfloat16, got dense; take that, or"):
        step_of(kind, "bfloat16", "dense")
    with pytest.raises(InputError, match="for the encoder bfloat16, got one that compares without signs or has no fast rule"):
        step_of(kind_of("abstopk"), "bfloat16")
    x_bd, weights = problem()
    with pytest.raises(InputError, match=r"expected float32 weights for the encoder onednn, got torch\.float64"):
        objective(x_bd.double(), Weights(*(w.double() for w in weights)), 1.0, workspace=Workspace(encoder="onednn"))
