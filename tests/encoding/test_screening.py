"""Screening against float64: no entry is lost, none is invented, values are exact to float32 rounding."""

import numpy as np
import pytest
import torch
from encoders import HERE, each
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.encoding import METHODS, Encoder, choice, fastest
from sae.encoding.bounds import Bfloat16Features, frame_of, norm_above, raised
from sae.encoding.encoder import adds_exactly
from sae.encoding.guess import Line
from sae.encoding.int8 import Int8Features
from sae.entries import Buffers
from sae.errors import InputError
from sae.objective.choice import above_of, top_of_rows

INT8 = pytest.mark.skipif("int8" not in HERE, reason="the int8 products of this processor are not exact")
SCREENED = {"bfloat16": Bfloat16Features, "int8": Int8Features}


def judge(x, W, b, above):
    """z − above in float64, and how far float32 may be from it: (d + 3) roundings of the sum of absolute values, and underflow."""
    x, W, b, above = (np.asarray(one, dtype=np.float64) for one in (x, W, b, above))
    size = np.abs(x) @ np.abs(W).T + np.abs(b) + np.abs(above)
    return x @ W.T + b - above, (x.shape[1] + 3) * 2.0**-24 * size + x.shape[1] * 2.0**-126


def dense(entries, rows, f):
    given = torch.zeros(rows, f, dtype=torch.bool)
    given[entries.row_n.long(), entries.feature_n.long()] = True
    return given.numpy()


def check(x, W, b, above, method, like=None):
    entries = Encoder(method, W, b, above, like_bd=like).entries(x, Buffers())
    margin, slack = judge(x, W, b, above)
    given = dense(entries, len(x), len(W))
    assert not (~given & (margin > slack)).any(), "an entry is lost"
    assert not (given & (margin < -slack)).any(), "an entry is invented"
    flat = entries.row_n.long() * len(W) + entries.feature_n
    assert (flat.diff() > 0).all(), "row after row, features ascending"
    at = entries.row_n.numpy(), entries.feature_n.numpy()
    above_n = np.broadcast_to(np.asarray(above, np.float64), (len(W),))[at[1]]
    assert (np.abs(entries.value_n.double().numpy() - above_n - margin[at]) <= slack[at]).all()
    return entries


@st.composite
def problems(draw):
    """Rows, weights, biases and thresholds with what makes rounding go wrong."""
    seed, b, d, f = draw(st.integers(0, 2**31)), draw(st.integers(1, 9)), draw(st.integers(1, 70)), draw(st.integers(1, 45))
    random = np.random.default_rng(seed)
    x, W = random.standard_normal((b, d)), random.standard_normal((f, d))
    kind = draw(st.sampled_from(["plain", "integers", "outlier", "range", "rows", "tiny", "denormal", "huge", "zeros", "mean"]))
    if kind == "integers":  # exact sums, so that ties at the threshold are real ones
        x, W = random.integers(-2, 3, (b, d)), random.integers(-2, 3, (f, d))
    elif kind == "outlier":
        x[:, 0] *= 1e4
        W[:, 0] /= 1e3
    elif kind == "range":
        x, W = x * 10.0 ** random.integers(-10, 11, (b, d)), W * 10.0 ** random.integers(-10, 11, (f, d))
    elif kind == "rows":
        x, W = x * 10.0 ** random.integers(-13, 14, (b, 1)), W * 10.0 ** random.integers(-13, 14, (f, 1))
    elif kind == "tiny":
        x, W = x * 1e-25, W * 1e-18
    elif kind == "denormal":
        x = x * 1e-40
    elif kind == "huge":  # norms that overflow when squared
        x, W = x * 1e22, W * 1e10
    elif kind == "zeros":
        x[random.random(b) < 0.5] = 0
        W[random.random(f) < 0.5] = 0
    elif kind == "mean":
        x = x + 300 * random.standard_normal(d)
    x, W = torch.from_numpy(np.asarray(x, np.float32)), torch.from_numpy(np.asarray(W, np.float32))
    z = (x.double() @ W.double().T).numpy()
    which = draw(st.sampled_from(["zero", "on one row's value", "quantile"]))
    b_f = {"zero": np.zeros(f), "on one row's value": -z[0], "quantile": np.full(f, -np.quantile(z, 0.9))}[which]
    above = torch.from_numpy(np.abs(np.asarray(random.standard_normal(f) * np.abs(z).mean(), np.float32))) if draw(st.booleans()) else 0.0
    return x, W, torch.from_numpy(np.asarray(b_f, np.float32)), above


@pytest.mark.parametrize("method", each(*METHODS))
@settings(max_examples=150, deadline=None)
@given(problem=problems(), framed=st.booleans())
def test_no_entry_is_lost_or_invented(method, problem, framed):
    check(*problem, method, like=problem[0] if framed else None)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), other=st.integers(0, 2**31))
def test_bits_depend_neither_on_the_precision_nor_on_the_frame(problem, other):
    x, W, b, above = problem
    found = [check(x, W, b, above, method) for method in SCREENED if method in HERE]
    strange = torch.from_numpy(np.random.default_rng(other).standard_normal((3, x.shape[1])).astype(np.float32) ** 5)
    found.append(check(x, W, b, above, "bfloat16", like=strange))
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], one))


@pytest.mark.parametrize("method", each(*SCREENED))
def test_nearly_all_is_dismissed_and_bounds_hold(method):
    """A bound that is right because it lets everything through would pass the tests above."""
    x, W, b = realistic()
    candidate = candidates(SCREENED[method](W, b, 0.0, frame_of(x, W)), x)
    z = x.double() @ W.double().T + b
    active = (z > 0).double().mean()
    assert active <= candidate.double().mean() < {"bfloat16": 1.25, "int8": 2.5}[method] * active
    assert candidate[z > 0].all()


def test_sizes_are_never_rounded_down():
    generator = torch.Generator().manual_seed(0)
    size = (torch.rand(100_000, generator=generator) + 1e-3) * 10.0 ** torch.randint(-30, 36, (100_000,), generator=generator)
    assert (raised(size).double() >= size.double() * (1 + 2**-9)).all()
    rows = torch.randn(200, 700, generator=generator) * 10.0 ** torch.randint(-44, 15, (200, 1), generator=generator)
    assert (norm_above(rows).double() >= rows.double().norm(dim=1)).all()


@INT8
def test_the_frame_tightens_outlier_dimensions():
    x, W, b = realistic()
    x[:, 3] = x[:, 3] * 40 + 200
    W[:, 3] /= 10
    b = -(x.double() @ W.double().T).quantile(0.99, dim=0).float()
    shares = []
    for like in (x, None):
        frame = frame_of(x, W)
        plain = frame._replace(centre_d=torch.zeros(96), scale_d=torch.ones(96), largest=float(x.abs().amax(1).median()))
        shares.append(candidates(Int8Features(W, b, 0.0, plain if like is None else frame), x).double().mean())
        check(x, W, b, 0.0, "int8", like)
    assert shares[0] < 0.5 * shares[1]


@INT8
@pytest.mark.parametrize("size", [3.0, 30.0, 1e4])
def test_offsets_beyond_the_columns_for_them_lose_nothing_and_let_little_through(size):
    x, W, _ = realistic()
    b = torch.where(torch.arange(len(W)) % 500 == 0, size, -size)
    entries = check(x, W, b, 0.0, "int8", x)
    share = candidates(Int8Features(W, b, 0.0, frame_of(x, W)), x)[:, b < 0].double().mean()
    assert len(entries.row_n) >= 3 * len(x) - 20
    assert share < 0.05


@pytest.mark.parametrize("method", each(*SCREENED))
@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")] * 40, "none", "equal"])
def test_rows_that_make_no_frame_lose_nothing(method, bad):
    x, W, b = realistic()
    like = {"none": x[:0], "equal": x[:1].repeat(9, 1)}.get(bad) if isinstance(bad, str) else x.clone()
    if not isinstance(bad, str):
        like[: len(bad), 0] = torch.tensor(bad)
    assert len(check(x, W, b, 0.0, method, like).row_n)


@INT8
def test_rows_too_wide_for_sums_of_bytes_use_the_product():
    x, W = torch.ones(2, 60_001), torch.ones(3, 60_001)
    assert not Encoder("int8", W, torch.zeros(3), like_bd=x).screens(x)
    assert len(Encoder("int8", W, torch.zeros(3), like_bd=x).entries(x, Buffers()).row_n) == 6


def candidates(features, x, floor=0.0):
    higher = features.above(floor, Buffers()) if floor else features
    return torch.cat([bound.T > 0 for _, bound in higher.upper_bounds(x, None, Buffers())], 1)


def realistic(b=64, d=96, f=1003, density=0.01):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(b, d, generator=generator), torch.randn(f, d, generator=generator)
    W /= W.norm(dim=1, keepdim=True)
    return x, W, -(x @ W.T).quantile(1 - density, dim=0)


@pytest.mark.parametrize("method", each(*METHODS))
@settings(max_examples=60, deadline=None)
@given(
    problem=problems(),
    k=st.integers(1, 12),
    guess=st.builds(Line, st.sampled_from([-1.0, 0.0, 0.1, 2.0]), st.sampled_from([-3.0, 0.0, 0.1, 1.0, 30.0])),
)
def test_the_largest_of_each_row(method, problem, k, guess):
    """As the k largest values of all that are above 0, computed by one and the same float32 way, whatever the guess."""
    x, W, b, _ = problem
    encoder = Encoder(method, W, b, like_bd=x)
    every, (top, _) = encoder.entries(x, Buffers()), top_of_rows(above_of(encoder, x, Buffers()), x.norm(dim=1), k, guess)
    for row in range(len(x)):
        of_all, of_top = (dict(zip(e.feature_n[e.row_n == row].tolist(), e.value_n[e.row_n == row].tolist())) for e in (every, top))
        assert of_top.items() <= of_all.items()
        assert sorted(of_all.values())[-k:] == sorted(of_top.values())


@pytest.mark.parametrize("method", each(*METHODS))
def test_a_second_look_at_a_batch_too_large_for_bounds_goes_the_same_way(method):
    x, W, b = realistic()
    x[0] *= 1e25
    encoder = Encoder(method, W, b, like_bd=x)
    every, (top, _) = encoder.entries(x, Buffers()), top_of_rows(above_of(encoder, x, Buffers()), x.norm(dim=1), 3, Line(0.0, 1e9))
    assert set(zip(*(one.tolist() for one in top))) <= set(zip(*(one.tolist() for one in every)))


@pytest.mark.parametrize("method", each(*METHODS))
def test_blocks_of_rows_and_memory_used_again_change_nothing(method, monkeypatch):
    x, W, b = realistic()
    encoder, buffers = Encoder(method, W, b, like_bd=x), Buffers()
    whole = encoder.entries(x, buffers)
    encoder.entries(-x[:7], buffers)
    later = encoder.entries(x, buffers, first_row=100)
    monkeypatch.setattr("sae.encoding.encoder.BLOCK_BYTES", 5 * 4 * len(W))
    monkeypatch.setattr("sae.encoding.encoder.BLOCK", 29)
    cut = encoder.entries(x, buffers)
    assert torch.equal(later.row_n, whole.row_n + 100)
    assert torch.equal(later.value_n, whole.value_n)
    assert torch.equal(cut.row_n, whole.row_n)
    assert torch.equal(cut.feature_n, whole.feature_n)
    assert torch.allclose(cut.value_n, whole.value_n, rtol=1e-5, atol=1e-6)
    assert method not in SCREENED or torch.equal(cut.value_n, whole.value_n)


@pytest.mark.parametrize("method", each(*SCREENED))
def test_numbers_that_are_not_finite_go_through_the_product(method):
    x, W, b = realistic()
    x[2, 5], x[4, 0] = torch.inf, torch.nan
    found, product = (Encoder(way, W, b, like_bd=x).entries(x, Buffers()) for way in (method, "product"))
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(found, product))


def test_no_rows():
    x, W, b = realistic()
    for method in HERE:
        assert [len(one) for one in Encoder(method, W, b).entries(x[:0], Buffers())] == [0, 0, 0]


def test_what_cannot_be_used_is_refused():
    _, W, b = realistic()
    with pytest.raises(InputError, match="expected an encoder out of product, onednn, bfloat16, int8, got 'fp8'"):
        Encoder("fp8", W, b)
    with pytest.raises(InputError, match=r"expected float32 weights for the encoder int8, got torch\.float64"):
        Encoder("int8", W.double(), b.double())
    adds_exactly.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        product = torch.Tensor.__matmul__
        patch.setattr(torch.Tensor, "__matmul__", lambda a, c: product(a, c) - 8 if a.dtype == torch.bfloat16 else product(a, c))
        with pytest.raises(InputError, match="bfloat16 products on cpu lose digits"):
            Encoder("bfloat16", W, b)
    adds_exactly.cache_clear()


def test_the_fastest_way_needs_a_clear_margin_and_is_measured_once(monkeypatch):
    x, W, b = realistic()
    seconds = {"product": 1.0, "onednn": 0.9, "bfloat16": 0.85, "int8": 0.95}
    calls = []
    monkeypatch.setattr(choice, "WORTH_TRYING", 0)
    monkeypatch.setattr(choice, "_fastest", {})
    monkeypatch.setattr(choice, "candidates", lambda device: METHODS[1:])
    monkeypatch.setattr(choice, "timed", lambda *args: calls.append(args) or seconds)
    assert fastest(x, W, b) == "product"
    seconds["bfloat16"] = 0.5
    assert fastest(x, W, b) == "product"
    assert len(calls) == 1
    assert fastest(x[:8], W, b) == "bfloat16"
    assert len(calls) == 2
    assert fastest(x.double(), W.double(), b.double()) == "product"
    assert len(calls) == 2
    monkeypatch.setattr(choice, "candidates", lambda device: ())
    monkeypatch.setattr(choice, "_fastest", {})
    assert fastest(x[:8], W, b) == "product"
    assert len(calls) == 2


def test_ways_are_timed_on_the_machine_at_the_density_that_is_meant():
    x, W, b = realistic(density=0.5)
    seconds = choice.timed(HERE, x[:4], W, b, choice.quantile(x, W, b))
    assert seconds.keys() == set(HERE)
    assert all(0 < value < 60 for value in seconds.values())
    z = x[:16] @ W.T + b
    assert (z > choice.quantile(x, W, b)).float().mean() == pytest.approx(choice.DENSITY, rel=0.05)
