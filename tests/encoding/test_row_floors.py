"""A lowest value for each row, and the guesses that TopK makes of it: they change what is looked at and never what is found."""

import numpy as np
import pytest
import torch
from encoders import HERE, each
from hypothesis import given, settings
from hypothesis import strategies as st
from test_screening import INT8, SCREENED, problems, realistic

from sae.encoding import METHODS, Encoder, choice, fastest
from sae.encoding.guess import SHORT, Line
from sae.entries import Buffers, Entries
from sae.errors import InputError
from sae.kinds import KINDS, Now
from sae.objective import Weights, Workspace, objective
from sae.objective import choice as chosen
from sae.objective.choice import top_of_lists


@pytest.mark.parametrize("method", each(*METHODS))
@settings(max_examples=120, deadline=None)
@given(problem=problems(), seed=st.integers(0, 2**31), spread=st.sampled_from([0.0, 0.3, 3.0, 14.0]), first=st.integers(0, 5))
def test_no_entry_above_its_rows_floor_is_lost_or_invented(method, problem, seed, spread, first):
    """Against float64; floors from far below the rows' values to far above, 0 among them."""
    x, W, b, _ = problem
    random = np.random.default_rng(seed)
    z = x.double().numpy() @ W.double().numpy().T + b.double().numpy()
    floor = np.quantile(z, 0.8, axis=1).clip(0) * np.exp(spread * random.standard_normal(len(x))) * (random.random(len(x)) > 0.2)
    floor = floor.clip(0, 3e38)
    floor_b = torch.from_numpy(floor.astype(np.float32))
    entries = Encoder(method, W, b, like_bd=x).entries(x, Buffers(), first, floor_b)
    given_bf = np.zeros(z.shape, bool)
    given_bf[entries.row_n.numpy() - first, entries.feature_n.numpy()] = True
    size = np.abs(x.double().numpy()) @ np.abs(W.double().numpy()).T + np.abs(b.double().numpy()) + floor_b.double().numpy()[:, None]
    margin, slack = z - floor_b.double().numpy()[:, None], (x.shape[1] + 3) * 2.0**-24 * size + x.shape[1] * 2.0**-126
    assert not (~given_bf & (margin > slack)).any(), "an entry is lost"
    assert not (given_bf & (margin < -slack)).any(), "an entry is invented"


@pytest.mark.parametrize("method", each(*SCREENED))
def test_bounds_follow_the_rows_floors(method):
    """Floors that differ three times between rows let through far less than one that is right for the lowest row."""
    x, W, b = realistic(b=256)
    x *= torch.linspace(0.5, 1.5, 256)[:, None]
    encoder = Encoder(method, W, b.mean().expand(len(W)).contiguous() * 0, like_bd=x)
    floor_b = (x @ W.T).topk(10).values[:, -1] * 0.999
    own, common = (encoder.candidates(x, Buffers(), floor) for floor in (floor_b, float(floor_b.min())))
    assert 10 * len(x) <= own < {"bfloat16": 13, "int8": 40}[method] * len(x)
    assert common > 3 * own
    assert encoder.candidates(x * float("inf"), Buffers(), floor_b) == len(x) * len(W)  # no bounds, so the whole product


@INT8
def test_features_whose_offset_has_no_columns_stay_candidates_whatever_the_floor():
    x, W, b = realistic()
    b[3], b[500] = 1e6, 1e5
    entries = Encoder("int8", W, b, like_bd=x).entries(x, Buffers(), floor=torch.linspace(0, 2e5, len(x)))
    z = x.double() @ W.double().T + b
    for row, floor in enumerate(torch.linspace(0, 2e5, len(x)).tolist()):
        assert set(entries.feature_n[entries.row_n == row].tolist()) == set((z[row] > floor).nonzero().squeeze(1).tolist())


def test_a_floor_needs_one_threshold_for_all_features():
    x, W, b = realistic()
    for method in HERE:
        with pytest.raises(InputError, match="expected one threshold for all features with a floor"):
            Encoder(method, W, b, torch.ones(len(W))).entries(x, Buffers(), floor=torch.zeros(len(x)))


def test_the_line_is_near_the_values_and_below_all_but_a_share_of_them():
    generator = torch.Generator().manual_seed(0)
    length_b = torch.rand(4000, generator=generator) * 9 + 1
    kth_b = 0.3 * length_b + 0.5 + 0.05 * length_b * torch.randn(4000, generator=generator)
    length_b[:3], kth_b[:3] = torch.tensor([900.0, 1200.0, 0.0]), torch.tensor([3.0, 900.0, 0.0])  # massive rows, and one of zeros
    line = Line.below(kth_b, length_b)
    assert float((kth_b < line.at(length_b)).double().mean()) == pytest.approx(SHORT, abs=0.002)
    assert line.slope / line.level == pytest.approx(0.3 / 0.5, rel=0.25)
    common = kth_b.quantile(SHORT)
    assert (kth_b - line.at(length_b))[3:].abs().mean() < 0.4 * (kth_b - common)[3:].abs().mean()


@pytest.mark.parametrize(
    ("kth", "length"),
    [
        ([0.0] * 5, [1.0] * 5),
        ([2.0], [3.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([float("nan"), 1.0], [1.0, 2.0]),
        ([1.0, 2.0], [float("inf"), 1.0]),
    ],
)
def test_a_line_of_rows_that_say_nothing_is_a_number(kth, length):
    line = Line.below(torch.tensor(kth), torch.tensor(length))
    assert np.isfinite(line).all()
    assert (line.at(torch.tensor([0.0, 1.0, 1e6])) >= 0).all()


def test_lists_taken_a_few_rows_at_a_time_are_those_of_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 30, generator=generator).relu() * (torch.arange(50)[:, None] % 7 != 0)
    row_n, feature_n = z.nonzero(as_tuple=True)
    entries = Entries(row_n.int(), feature_n.int(), z[row_n, feature_n])
    whole = top_of_lists(entries, 50, 4)
    monkeypatch.setattr(chosen, "LIST_BYTES", 4 * 30 * 8)
    assert all(map(torch.equal, top_of_lists(entries, 50, 4), whole))


@INT8
@pytest.mark.parametrize("crowded", [False, True])
def test_a_topk_step_screens_only_where_bounds_leave_few_and_decides_by_the_batch_alone(crowded, monkeypatch):
    """Rows that are long in a direction that no feature reads have loose bounds. The bits are those of the chosen path, for any guess."""
    x, W, _ = realistic(b=512, f=4096)
    if crowded:
        generator = torch.Generator().manual_seed(1)
        huge_d = torch.nn.functional.normalize(torch.randn(96, generator=generator), dim=0)
        W -= (W @ huge_d)[:, None] * huge_d
        x += 1000 * torch.randn(512, 1, generator=generator) * huge_d
    weights = Weights(W, torch.zeros(len(W)), W.clone(), torch.zeros(W.shape[1]))
    now = Now(0, 10, x.shape[1], torch.zeros(len(W), dtype=torch.bool), {})
    calls = []
    entries = Encoder.entries
    monkeypatch.setattr(Encoder, "entries", lambda self, *rest, **named: calls.append(1) or entries(self, *rest, **named))

    def step(encoder, line=None):
        workspace = Workspace(encoder=encoder)
        if line is not None:
            workspace.lines["0"] = line
        return objective(x, weights, KINDS["topk"](k=(5,)).goal(5, now), "auto", workspace)

    first, product = step("int8"), step("product")
    assert bool(calls) is not crowded
    for line in (Line(0.0, 0.0), Line(0.001, 1e6)):
        assert torch.equal(step("int8", line).gradients.W_dec_fd, first.gradients.W_dec_fd)
    torch.testing.assert_close(first.gradients.W_dec_fd, product.gradients.W_dec_fd, rtol=1e-4, atol=1e-6)
    assert not crowded or torch.equal(first.gradients.W_enc_fd, product.gradients.W_enc_fd)


def test_the_fastest_way_for_topk_is_measured_with_the_rows_floors(monkeypatch):
    x, W, b = realistic()
    floors = []
    monkeypatch.setattr(choice, "WORTH_TRYING", 0)
    monkeypatch.setattr(choice, "_fastest", {})
    monkeypatch.setattr(choice, "candidates", lambda device: METHODS[1:])
    monkeypatch.setattr(choice, "timed", lambda *args: floors.append(args[-1]) or dict.fromkeys(METHODS, 1.0))
    fastest(x, W, b * 0, k=5)
    fastest(x, W, b * 0, k=9)
    kth = [(x @ W.T).topk(k).values[:, -1] for k in (5, 9)]
    for floor, exact in zip(floors, kth):
        assert 0.5 * SHORT < float((exact < floor).double().mean()) < 2 * SHORT
        assert (floor > 0.7 * exact).all()
