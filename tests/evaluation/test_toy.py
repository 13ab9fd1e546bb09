"""The toy of known ground truth: our step recovers its features at the stated setting, and loses them where it must."""

from pathlib import Path

import pytest
import torch

from sae.dictionaries.dictionary import Dictionary
from sae.evaluation.toy import Recovery, recovery, toy, toy_l1
from sae.kinds import ReLU
from sae.objective import Step, Weights, Workspace, objective
from sae.training import TrainingConfig
from sae.training.sweep import Start, Sweep


def train_on_toy(a: float, d_sae: int, l1_warmup: float = 0.05, **settings) -> tuple[Recovery, Step]:
    """d 256, 512 true features of which 5 are active, batches of 512; what is recovered, and the last step."""
    data, d = toy(), 256
    scale = (d / data.mean_squared_norm) ** 0.5
    l1 = toy_l1(a, d, d_sae, data.mean_squared_norm)
    recipe = TrainingConfig(cache=Path(), out=Path(), **settings).recipe()
    sweep = Sweep([Start(Dictionary.initial(d, d_sae, seed=0))], ReLU(l1=(l1,), l1_warmup=l1_warmup), recipe, "auto", Workspace())
    generator = torch.Generator().manual_seed(1)
    for step in range(recipe.steps):
        result = sweep.step(data.sample(512, generator) * scale, step)
    return recovery(data.truth_gd, sweep.dictionary(0).W_dec_fo), result


def test_true_features_are_recovered_at_the_stated_setting():
    """Twice as many features as true ones, a = 0.3, and 500 steps at learning rate 3e-3 (0.26M rows; the study's 3M are the soak)."""
    found, last = train_on_toy(0.3, 1024, steps=500, lr=3e-3)
    assert found.mmcs > 0.97
    assert found.fraction_found > 0.95
    assert found.one_to_one > 0.97  # no two true features share a dictionary feature
    assert 4 < last.l0 < 20  # five are active
    assert last.squared_error < 0.05 * 256


def test_too_large_a_coefficient_collapses():
    """As many features as true ones, a = 3 from the first step on: nothing is learnt, the mean error stays that of no dictionary."""
    found, last = train_on_toy(3.0, 512, steps=150, lr=3e-3, l1_warmup=0.0)
    assert found.mmcs < 0.3
    assert found.fraction_found == 0
    assert last.squared_error > 0.9 * 256


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_true_features_are_recovered_over_three_million_rows():
    found, _ = train_on_toy(0.3, 1024, steps=6000, lr=1e-3)
    assert found.mmcs > 0.97
    assert found.fraction_found > 0.95


def test_a_random_dictionary_recovers_nothing():
    data = toy()
    random_fd = torch.randn(1024, 256, generator=torch.Generator().manual_seed(3))
    found = recovery(data.truth_gd, random_fd)
    assert 0.15 < found.mmcs < 0.22  # the largest of 1024 cosines in 256 dimensions
    assert found.fraction_found == 0


def test_recovery_of_known_dictionaries():
    truth_gd = torch.eye(4)
    copies = torch.cat([3 * truth_gd, truth_gd])  # lengths do not matter, doubles cost nothing in either direction
    assert recovery(truth_gd, copies) == (1, 1, 1, 1)
    assert recovery(truth_gd, -truth_gd) == (0, 0, 0, 0)  # signed: pointing the other way is not found
    half = recovery(truth_gd, truth_gd[:2])
    assert half == Recovery(mmcs=0.5, mmcs_reverse=1, fraction_found=0.5, one_to_one=1)
    shared = recovery(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    assert shared.mmcs == pytest.approx((1 + 0.6) / 2)
    assert shared.one_to_one == pytest.approx((0 + 0.6) / 2)  # 1 and −0.8, or 0.6 and 0: the larger sum


def test_samples_have_the_stated_sparsity_order_and_norm():
    data = toy(64, 128)
    assert float(data.probability_g.sum()) == pytest.approx(5, rel=1e-5)
    assert float(data.probability_g[10] / data.probability_g[0]) == pytest.approx(0.99**10, rel=1e-5)
    x_bd = data.sample(40_000, torch.Generator().manual_seed(0))
    assert float(x_bd.square().sum(1).mean()) == pytest.approx(data.mean_squared_norm, rel=0.02)
    torch.testing.assert_close(x_bd.mean(0), data.probability_g / 2 @ data.truth_gd, atol=0.02, rtol=0)


def test_coefficient_gives_the_studys_loss_times_d_and_scale():
    """The study's loss, written out with unit rows in raw units, against our objective in training units."""
    g = torch.Generator().manual_seed(0)
    d, f, a, mean_squared_norm = 8, 24, 0.3, 1.7
    scale = (d / mean_squared_norm) ** 0.5
    x_bd = torch.randn(50, d, generator=g, dtype=torch.float64)
    W_enc_fd, W_dec_fd = torch.randn(2, f, d, generator=g, dtype=torch.float64)
    W_dec_fd = torch.nn.functional.normalize(W_dec_fd, dim=-1)
    acts_bf = torch.relu(x_bd @ W_enc_fd.T)
    study = (acts_bf @ W_dec_fd - x_bd).square().mean() + a * acts_bf.sum(1).mean() / f
    grown = 3.0  # our rows may have any norm: the same function with longer rows and smaller activations
    zeros = torch.zeros(f, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    weights = Weights(W_enc_fd / grown, zeros[0], W_dec_fd * grown, zeros[1])
    ours = objective(x_bd * scale, weights, toy_l1(a, d, f, mean_squared_norm), "reference").loss
    assert float(ours) == pytest.approx(float(study) * d * scale**2, rel=1e-9)
