"""Random directions and shuffled labels."""

import pytest
import torch

from sae.errors import InputError
from steering.directions.diffmean import diffmean
from steering.directions.random import random_direction, random_in_span, shuffled_labels


def test_random_directions_have_the_norm_repeat_and_favour_no_axis():
    made = [random_direction(6, "resid_post.1", seed, norm=2.5) for seed in range(3000)]
    assert all(vector.norm == pytest.approx(2.5, rel=1e-5) for vector in made[:20])
    assert torch.equal(made[4].direction_d, random_direction(6, "resid_post.1", 4, norm=2.5).direction_d)
    every = torch.stack([vector.direction_d for vector in made])
    torch.testing.assert_close(every.T @ every / len(made), torch.eye(6) * 2.5**2 / 6, rtol=0, atol=0.1)
    torch.testing.assert_close(every.mean(0), torch.zeros(6), rtol=0, atol=0.1)


def test_random_in_span_stays_in_the_span_and_is_uniform_there_for_orthonormal_rows():
    basis_kd = torch.linalg.qr(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))[0].T
    every = torch.stack([random_in_span(basis_kd, "resid_post.1", seed, norm=3).direction_d for seed in range(3000)])
    torch.testing.assert_close(every @ basis_kd.T @ basis_kd, every, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(every.norm(dim=1), torch.full((3000,), 3.0))
    coordinates = every @ basis_kd.T
    torch.testing.assert_close(coordinates.T @ coordinates / 3000, torch.eye(3) * 3, rtol=0, atol=0.25)
    with pytest.raises(InputError, match="only zeros"):
        random_in_span(torch.zeros(4, 9), "resid_post.1", 0)


def test_shuffled_labels_lose_the_planted_direction_and_repeat():
    planted_d = torch.zeros(8).index_fill(0, torch.tensor([3]), 4.0)
    generator = torch.Generator().manual_seed(1)
    pos_nd, neg_nd = torch.randn(300, 8, generator=generator) + planted_d, torch.randn(500, 8, generator=generator)
    with pytest.warns(UserWarning, match="unequally many"):
        right = diffmean(pos_nd, neg_nd, "resid_post.1")
    shuffled = [shuffled_labels(pos_nd, neg_nd, "resid_post.1", seed).direction_d for seed in range(40)]
    assert right.direction_d[3] > 3.7
    assert max(abs(float(x[3])) for x in shuffled) < 0.5
    assert torch.equal(shuffled[0], shuffled_labels(pos_nd, neg_nd, "resid_post.1", 0).direction_d)


def test_shuffled_labels_leave_nothing_of_sets_that_lie_far_apart():
    noise_nd = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        vector = shuffled_labels(noise_nd[:20] + 100, noise_nd[20:] - 100, "resid_post.1", seed)
        assert vector.norm < 3
        assert abs(vector.direction_d.sum()) < 10


def test_shuffling_reaches_every_split_into_even_halves_and_no_other():
    rows_nd = torch.tensor([[1.0, 2.0], [5.0, -1.0], [0.0, 7.0], [-3.0, 4.0]])
    halves = [((a, b), (1 - a, 5 - b)) for a in (0, 1) for b in (2, 3)]
    possible = {tuple((rows_nd[list(x)].mean(0) - rows_nd[list(y)].mean(0)).tolist()) for x, y in halves}
    seen = {tuple(shuffled_labels(rows_nd[:2], rows_nd[2:], "resid_post.1", seed).direction_d.tolist()) for seed in range(60)}
    assert len(possible) == 4
    assert seen == possible
    with pytest.raises(InputError, match="more than one row"):
        shuffled_labels(rows_nd[:1], rows_nd[1:2], "resid_post.1", 0)
