"""Every kind against its formula: gradients of the fast step in float64, a hundred steps of both, and what is saved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import InputError
from sae.kinds import KINDS, JumpReLU, Matryoshka, Now, PAnnealing
from sae.objective import Adam, Weights, Workspace, fast, objective

D, F, B = 12, 48, 40
NAMES = [*KINDS, "jumprelu-step", "jumprelu-tanh", "p-annealing-early"]


def kind_of(name):
    if name in ("relu", "gated"):
        return KINDS[name](l1=(0.7,), l1_warmup=0.0)
    if name.startswith("p-annealing"):
        return PAnnealing(l1=(0.7,), l1_warmup=0.0)
    if name.startswith("jumprelu"):
        loss = name.partition("-")[2] or "target"
        return JumpReLU(loss=loss, target_l0=(5.0,) if loss == "target" else JumpReLU.target_l0, bandwidth=0.2, threshold=0.1, warmup=0.0)
    if name == "matryoshka":
        return Matryoshka(k=(5,), prefixes=(7, 20), aux_k=3)
    return KINDS[name](k=(5,)) if name == "abstopk" else KINDS[name](k=(5,), aux_k=3)


def problem(seed, d=D, o=D, f=F, b=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x_bd, y_bo = torch.randn(b, d, generator=generator), torch.randn(b, o, generator=generator)
    W_enc_fd, W_dec_fo = torch.randn(f, d, generator=generator), torch.randn(f, o, generator=generator)
    W_dec_fo /= W_dec_fo.norm(dim=-1, keepdim=True)
    weights = Weights(W_enc_fd, torch.randn(f, generator=generator) * 0.3 - 1, W_dec_fo, torch.randn(o, generator=generator) * 0.3)
    dead_f = torch.rand(f, generator=generator) < 0.3
    return x_bd.to(dtype), y_bo.to(dtype), Weights(*(w.to(dtype) for w in weights)), dead_f


def now_of(kind, dead_f, step=60, steps=100, sites=1, d=D):
    return Now(step, steps, d, dead_f, kind.state(), sites)


def own_of(kind, weights, y_bo, dtype=torch.float64):
    own = {name: tensor.to(dtype) for name, tensor in kind.own(D, len(weights.b_enc_f)).items()}
    if y_bo is not None:
        own["W_skip_od"] = torch.randn(y_bo.shape[1], D, generator=torch.Generator().manual_seed(7)).to(dtype)
    return own


def assert_same(step, judge, tolerance):
    for name in ("loss", "squared_error", "sparsity", "l0", "threshold"):
        assert torch.allclose(getattr(step, name), getattr(judge, name).to(step.loss), rtol=tolerance, atol=1e-12), name
    assert torch.equal(step.fired_f, judge.fired_f)
    named = {**dict(zip(Weights._fields, step.gradients)), **step.own_gradients}
    theirs = {**dict(zip(Weights._fields, judge.gradients)), **judge.own_gradients}
    assert named.keys() == theirs.keys()
    for name, gradient in named.items():
        assert (gradient - theirs[name]).norm() <= tolerance * theirs[name].norm() + 1e-12, name


@pytest.mark.parametrize("transcodes", [False, True], ids=["autoencoder", "transcoder"])
@pytest.mark.parametrize("path", ["dense", "sparse", "auto"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_gradients_equal_autograd_on_the_formula(name, path, transcodes, seed):
    kind = kind_of(name)
    x_bd, y_bo, weights, dead_f = problem(seed, o=9 if transcodes else D)
    y_bo = y_bo if transcodes else None
    own = own_of(kind, weights, y_bo)
    goal = kind.goal(kind.values[0], now_of(kind, dead_f, step=0 if name.endswith("early") else 60))
    step, judge = (objective(x_bd, weights, goal, which, y_bo=y_bo, own=own) for which in (path, "reference"))
    assert_same(step, judge, 1e-9)


@pytest.mark.parametrize("name", ["relu", "p-annealing", "jumprelu-tanh", "gated"])
def test_norms_of_a_crosscoder_are_sums_over_its_sites(name):
    kind = kind_of(name)
    x_bd, _, weights, dead_f = problem(3)
    goal = kind.goal(kind.values[0], now_of(kind, dead_f, sites=3))
    for path in ("dense", "sparse"):
        step, judge = (objective(x_bd, weights, goal, which, own=own_of(kind, weights, None)) for which in (path, "reference"))
        assert_same(step, judge, 1e-9)
    norm_f = sum(part.norm(dim=-1) for part in weights.W_dec_fd.split(D // 3, dim=-1))
    acts_bf = torch.relu((x_bd - weights.b_dec_d) @ weights.W_enc_fd.T + weights.b_enc_f)
    if name == "relu":
        assert step.sparsity == pytest.approx(float((acts_bf * norm_f).sum(-1).mean()))


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_steps_equal_those_of_the_formula(name):
    """In float32 through the fast path and through autograd, Adam and unit rows included: the losses stay together."""
    kind, curves = kind_of(name), []
    for path in ("auto", "reference"):
        x_bd, _, weights, dead_f = problem(1, dtype=torch.float64)
        own = own_of(kind, weights, None)
        adam = Adam([*weights, *own.values()])
        workspace, losses = Workspace(), []
        for number in range(100):
            batch = torch.randn(B, D, generator=torch.Generator().manual_seed(number), dtype=torch.float64) + x_bd[:1]
            goal = kind.goal(kind.values[0], now_of(kind, dead_f, step=number))
            step = objective(batch, weights, goal, path, workspace, adam, 1.0, own=own, unit_rows=kind.unit_rows)
            kind.after(step, own, now_of(kind, dead_f))
            losses.append(float(step.loss))
        if kind.unit_rows:
            assert weights.W_dec_fd.norm(dim=-1).sub(1).abs().max() < 1e-12
        curves.append(torch.tensor(losses))
    assert torch.allclose(curves[0], curves[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, F), scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]), ties=st.booleans())
def test_the_k_largest_are_those_whatever_was_guessed(name, seed, k, scale, ties):
    """Against a sort of everything; the guess is one that an earlier, very different batch left."""
    x_bd, _, weights, _ = problem(seed)
    if ties:
        weights = Weights(weights.W_enc_fd.round(), weights.b_enc_f.round(), weights.W_dec_fd, weights.b_dec_d.round())
        x_bd = x_bd.round()
    kind = KINDS[name](k=(k,))
    goal = kind.goal(k, now_of(kind, torch.zeros(F, dtype=torch.bool)))
    workspace = Workspace()
    workspace.guesses["0"] = scale
    for _ in range(2):
        step = objective(x_bd, weights, goal, "sparse", workspace)
        z_bf = (x_bd - weights.b_dec_d) @ weights.W_enc_fd.T + weights.b_enc_f
        size_bf = z_bf.abs() if name == "abstopk" else z_bf
        if name == "batchtopk":
            order_n = size_bf.flatten().sort(descending=True, stable=True).indices[: B * k]
            kept_bf = torch.zeros(B * F, dtype=torch.bool).index_fill(0, order_n, True).view(B, F)
        else:
            order_bk = size_bf.sort(dim=-1, descending=True, stable=True).indices[:, :k]
            kept_bf = torch.zeros(B, F, dtype=torch.bool).scatter(1, order_bk, True)
        kept_bf &= size_bf > 0
        assert torch.equal(step.fired_f, kept_bf.sum(0))
        acts_bf = z_bf * kept_bf
        error = (acts_bf @ weights.W_dec_fd + weights.b_dec_d - x_bd).square().sum(-1).mean()
        assert torch.allclose(step.squared_error, error, rtol=1e-9)


def test_chunks_of_rows_change_nothing(monkeypatch):
    for name in NAMES:
        kind = kind_of(name)
        x_bd, _, weights, dead_f = problem(5)
        goal, own = kind.goal(kind.values[0], now_of(kind, dead_f)), own_of(kind, weights, None)
        whole = objective(x_bd, weights, goal, "sparse", Workspace(), own=own)
        monkeypatch.setattr(fast, "CHUNK_BYTES", 7 * F * 8)
        parts = objective(x_bd, weights, goal, "sparse", Workspace(), own=own)
        monkeypatch.undo()
        assert_same(parts, whole, 1e-12)


def test_the_power_of_p_annealing_falls_and_keeps_the_penalty():
    kind = PAnnealing(l1=(2.0,), l1_warmup=0.0, p_end=0.5, anneal=(0.2, 0.8), falls=5)
    powers = [kind.power(step, 100) for step in range(100)]
    assert powers[19] == 1
    assert powers[20] == pytest.approx(0.9)
    assert sorted(set(powers), reverse=True) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5])
    x_bd, _, weights, dead_f = problem(0)
    state = kind.state()
    before = kind.goal(2.0, Now(19, 100, D, dead_f, state)).loss(x_bd, None, weights, {}).loss
    kind.before(x_bd, None, weights, {}, 2.0, Now(20, 100, D, dead_f, state))
    after = kind.goal(2.0, Now(20, 100, D, dead_f, state)).loss(x_bd, None, weights, {}).loss
    assert after == pytest.approx(float(before), rel=1e-6)


BAD = [
    ("relu", dict(l1=(-1.0,)), "--l1"),
    ("relu", dict(l1=(2.0, 2.0)), "--l1"),
    ("topk", dict(k=(F + 1,)), "--k must be from 1 to the number of features, 48, got 49"),
    ("batchtopk", dict(k=()), "--k"),
    ("matryoshka", dict(prefixes=(20, 10)), "--prefixes"),
    ("jumprelu", dict(target_l0=(0.0,)), "--target-l0 must be above 0"),
    ("jumprelu", dict(loss="step", target_l0=(5.0,)), "--target-l0 is for --loss target"),
    ("p-annealing", dict(p_end=1.0), "--p-end"),
    ("topk", dict(aux_coefficient=-1.0), "--aux-coefficient"),
]


@pytest.mark.parametrize(("name", "options", "said"), BAD)
def test_options_that_cannot_be_meant_are_refused(name, options, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        KINDS[name](**options).check(F)


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="divides by 16"):
        Matryoshka().check(50)


def test_every_flag_says_what_it_does():
    for kind in KINDS.values():
        assert kind.__doc__
        assert kind.__doc__.startswith("Train ")
