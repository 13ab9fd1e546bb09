"""Every path of the objective against float64 autograd on the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import InputError
from sae.objective import Adam, Weights, Workspace, fast, objective


def random_problem(rows, d, f, density, seed, dtype=torch.float32):
    """A batch and weights of which about `density` of the code is active (0 and 1 exactly, by a large bias)."""
    generator = torch.Generator().manual_seed(seed)
    x_bd = torch.randn(rows, d, generator=generator) + 0.5
    W_enc_fd, W_dec_fd = torch.randn(2, f, d, generator=generator) / d**0.5
    b_dec_d = torch.randn(d, generator=generator)
    z_bf = (x_bd - b_dec_d) @ W_enc_fd.T
    bias = 1e3 if density == 1 else -1e3 if density == 0 else -z_bf.quantile(1 - density)
    weights = Weights(W_enc_fd, torch.full((f,), float(bias)), W_dec_fd, b_dec_d)
    return x_bd.to(dtype), Weights(*(w.to(dtype) for w in weights))


def formula(x_bd, weights, l1):
    """The objective in float64, term by term, gradients by autograd; written apart from the package."""
    x, (W_enc, b_enc, W_dec, b_dec) = x_bd.double(), [w.double().requires_grad_() for w in weights]
    f = ((x - b_dec) @ W_enc.T + b_enc).clamp(min=0)
    error = (f @ W_dec + b_dec - x).pow(2).sum(1)
    penalty = (f * W_dec.pow(2).sum(1).sqrt()).sum(1)
    loss = (error + l1 * penalty).mean()
    loss.backward()
    return loss, error.mean(), penalty.mean(), (f > 0).sum(0), [w.grad for w in (W_enc, b_enc, W_dec, b_dec)]


def assert_equals_formula(step, x_bd, weights, l1, tolerance=1e-5):
    loss, error, penalty, fired_f, gradients = formula(x_bd, weights, l1)
    for ours, theirs in ((step.loss, loss), (step.squared_error, error), (step.sparsity, penalty)):
        assert abs(ours - theirs) <= tolerance * abs(theirs) + 1e-12
    assert torch.equal(step.fired_f, fired_f)
    assert step.l0 == pytest.approx(fired_f.sum().item() / len(x_bd), rel=1e-6)
    for ours, theirs in zip(step.gradients, gradients):
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12


@pytest.mark.parametrize("path", ["reference", "dense", "sparse", "auto"])
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    d=st.integers(1, 24),
    f=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    l1=st.sampled_from([0.0, 0.7, 20.0]),
    seed=st.integers(0, 10**6),
)
def test_every_path_equals_float64_autograd(path, rows, d, f, density, l1, seed):
    x_bd, weights = random_problem(rows, d, f, density, seed, torch.float64)
    # A pre-activation within rounding of zero may be active in one order of summation and not in another: no path can be held to that.
    z_bf = (x_bd - weights.b_dec_d) @ weights.W_enc_fd.T + weights.b_enc_f
    if z_bf.abs().min() > 1e-9:
        assert_equals_formula(objective(x_bd, weights, l1, path), x_bd, weights, l1, 1e-9)


@pytest.mark.parametrize("path", ["dense", "sparse", "auto"])
@pytest.mark.parametrize(("density", "tolerance"), [(0.0, 1e-5), (0.02, 1e-5), (0.3, 1e-5), (1.0, 1e-4)])
def test_single_precision_equals_float64_to_rounding(path, density, tolerance):
    """The bias of 1,000 that makes every entry active costs three digits."""
    x_bd, weights = random_problem(64, 32, 256, density, 9)
    z_bf = (x_bd.double() - weights.b_dec_d) @ weights.W_enc_fd.double().T + weights.b_enc_f
    assert z_bf.abs().min() > 1e-6
    assert_equals_formula(objective(x_bd, weights, 3.0, path), x_bd, weights, 3.0, tolerance)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_one_feature_firing_for_all_rows(path):
    x_bd, weights = random_problem(600, 8, 20, 0.0, 0)
    weights.b_enc_f[3] = 7.0
    weights.W_enc_fd[3] = 0.01
    step = objective(x_bd, weights, 2.0, path)
    assert step.fired_f.tolist() == [600 if j == 3 else 0 for j in range(20)]
    assert_equals_formula(step, x_bd, weights, 2.0)


@pytest.mark.parametrize("path", ["dense", "sparse", "auto"])
def test_chunks_of_rows_change_nothing(path, monkeypatch):
    x_bd, weights = random_problem(50, 8, 30, 0.1, 1)
    monkeypatch.setattr(fast, "CHUNK_BYTES", 7 * 30 * 4)  # chunks of seven rows, the last one of a single row
    assert_equals_formula(objective(x_bd, weights, 0.5, path), x_bd, weights, 0.5)


def test_auto_goes_sparse_where_the_code_is_sparse_and_says_so():
    shares = {}
    for density in (0.02, 0.5):
        x_bd, weights = random_problem(64, 16, 200, density, 2)
        shares[density] = objective(x_bd, weights, 1.0).sparse_share
    assert shares == {0.02: 1.0, 0.5: 0.0}


def test_a_reused_workspace_leaves_no_trace_of_the_last_step():
    workspace = Workspace()
    for seed, rows in ((3, 40), (4, 11), (5, 40)):
        x_bd, weights = random_problem(rows, 8, 30, 0.2, seed)
        assert_equals_formula(objective(x_bd, weights, 1.0, "auto", workspace), x_bd, weights, 1.0)


def test_zero_decoder_row_has_finite_gradient():
    x_bd, weights = random_problem(20, 6, 9, 0.5, 6)
    weights.W_dec_fd[4] = 0
    for path in ("dense", "sparse"):
        step = objective(x_bd, weights, 1.0, path)
        assert all(g.isfinite().all() for g in step.gradients)


@pytest.mark.parametrize("bad", [torch.zeros(3, 5), torch.zeros(0, 8), torch.zeros(8), torch.zeros(3, 8, dtype=torch.int64)])
def test_batches_that_do_not_fit_are_refused(bad):
    _, weights = random_problem(4, 8, 12, 0.5, 7)
    with pytest.raises(InputError, match=r"expected a batch of floating point rows \[b, 8\]"):
        objective(bad, weights, 1.0)


@pytest.mark.parametrize("path", ["reference", "dense", "sparse", "auto"])
def test_a_sweep_equals_its_dictionaries_one_by_one(path):
    problems = [random_problem(30, 8, 40, density, seed) for density, seed in ((0.1, 1), (0.6, 2), (0.0, 3))]
    x_bd, swept = problems[0][0], Weights(*map(torch.stack, zip(*(weights for _, weights in problems))))
    step = objective(x_bd, swept, torch.tensor([0.5, 2.0, 7.0]), path)
    for k, l1 in enumerate((0.5, 2.0, 7.0)):
        assert_equals_formula(step.of(k), x_bd, swept.of(k), l1)


def adam_by_hand(parameter, gradient, moment, square, step, lr, betas=(0.9, 0.999), eps=1e-8):
    """Kingma and Ba (2015), algorithm 1, in float64."""
    moment = betas[0] * moment + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    change = lr * (moment / (1 - betas[0] ** step)) / ((square / (1 - betas[1] ** step)).sqrt() + eps)
    return parameter - change, moment, square


def assert_applied_as_by_hand(path, largest_norm, workspace=None, sweep=2):
    """Three applied steps of a sweep against the formula's gradients, clipped and put through Adam by hand in float64."""
    problems = [random_problem(20, 6, 24, 0.3, seed) for seed in range(sweep)]
    weights = Weights(*map(torch.stack, zip(*(w for _, w in problems))))
    expected = [[w.double().clone() for w in weights.of(k)] for k in range(sweep)]
    state = [[(0.0, 0.0)] * 4 for _ in range(sweep)]
    adam = Adam(weights, 0.01)
    l1_k = torch.arange(1.0, sweep + 1)
    for t in (1, 2, 3):
        x_bd, _ = random_problem(20, 6, 24, 0.3, 100 + t)
        step = objective(x_bd, weights, l1_k, path, workspace, adam, largest_norm)
        assert step.gradients is None
        for k in range(sweep):
            gradients = formula(x_bd, Weights(*(w.detach() for w in expected[k])), float(l1_k[k]))[4]
            norm = sum(g.pow(2).sum() for g in gradients).sqrt()
            factor = min(1.0, largest_norm / float(norm)) if largest_norm else 1.0
            for i, gradient in enumerate(gradients):
                expected[k][i], *moments = adam_by_hand(expected[k][i], factor * gradient, *state[k][i], t, 0.01)
                state[k][i] = tuple(moments)
    for k in range(sweep):
        for ours, theirs in zip(weights.of(k), expected[k]):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["reference", "dense", "sparse"])
@pytest.mark.parametrize("largest_norm", [0.0, 0.5])
def test_an_applied_step_is_adam_on_the_clipped_exact_gradient(path, largest_norm):
    assert_applied_as_by_hand(path, largest_norm)


@pytest.mark.parametrize("path", ["reference", "dense", "sparse", "auto"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_named_and_leave_the_weights_alone(path, value):
    x_bd, weights = random_problem(9, 8, 12, 0.5, 7)
    x_bd[2, 3] = x_bd[7, 0] = value
    before = [w.clone() for w in weights]
    adam = Adam(weights)
    with pytest.raises(InputError, match=r"2 of 9 rows of the batch are not finite \(rows 2, 7\); the weights were left alone"):
        objective(x_bd, weights, 1.0, path, optimizer=adam)
    assert all(torch.equal(a, b) for a, b in zip(before, weights))


def test_a_loss_that_overflows_leaves_the_weights_alone():
    """Rows of 1e30 are finite; their squares are not."""
    x_bd, weights = random_problem(9, 8, 12, 0.5, 7)
    before = [w.clone() for w in weights]
    adam = Adam(weights)
    step = objective(x_bd * 1e30, weights, 1.0, optimizer=adam)
    assert not step.loss.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, weights))


def test_an_optimizer_of_other_tensors_is_refused():
    x_bd, weights = random_problem(9, 8, 12, 0.5, 7)
    for parameters in (weights[:3], [w.clone() for w in weights], [*weights, torch.zeros(3)]):
        with pytest.raises(InputError, match=r"expected optimizer=Adam\(...\) over exactly the weights"):
            objective(x_bd, weights, 1.0, optimizer=Adam(parameters))


def test_adam_has_the_bits_of_torchs_and_leaves_out_a_bad_step():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in ((37, 11), (37,), ())]
    theirs = [p.clone().requires_grad_() for p in parameters]
    ours, reference = Adam(parameters, 3e-3, (0.8, 0.99)), torch.optim.Adam(theirs, lr=3e-3, betas=(0.8, 0.99), fused=True)
    for number in range(30):
        ours.lr = reference.param_groups[0]["lr"] = 3e-3 / (1 + number)
        for parameter in theirs:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        ours.step([torch.full_like(p, torch.inf) for p in parameters], torch.tensor(True))
        ours.step([p.grad for p in theirs], torch.tensor(False))
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, theirs))
    assert [int(step) for step in ours.steps] == [30] * 3


def test_batches_of_other_layouts_are_taken():
    """A transposed view and a half-precision batch give what their float32 copies give."""
    x_bd, weights = random_problem(8, 8, 12, 0.5, 7)
    for batch in (x_bd.T, x_bd.bfloat16(), x_bd[::2]):
        assert_equals_formula(objective(batch, weights, 1.0), batch.float(), weights, 1.0)


def test_what_a_cpu_lacks_is_refused():
    x_bd, weights = random_problem(8, 8, 12, 0.5, 7)
    with pytest.raises(InputError, match="expected precision float32 on cpu, got bfloat16"):
        objective(x_bd, weights, 1.0, "dense", Workspace("bfloat16"))


def test_a_hundred_steps_follow_the_dense_path(tmp_path):
    """From dense to sparse code under Adam, the sparse path's loss curve stays with the dense path's to rounding."""
    curves = {}
    for path in ("dense", "sparse"):
        generator = torch.Generator().manual_seed(0)
        _, weights = random_problem(4, 12, 48, 0.5, 8, torch.float64)
        parameters = [w.clone() for w in weights]
        adam = torch.optim.Adam(parameters, lr=1e-2)
        curves[path] = []
        for _ in range(100):
            x_bd = torch.randn(32, 12, generator=generator, dtype=torch.float64)
            step = objective(x_bd, Weights(*parameters), 1.0, path)
            for parameter, gradient in zip(parameters, step.gradients):
                parameter.grad = gradient
            adam.step()
            curves[path].append(float(step.loss))
    assert curves["sparse"] == pytest.approx(curves["dense"], rel=1e-9)
    assert curves["dense"][-1] < 0.9 * curves["dense"][0]
