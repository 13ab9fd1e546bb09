"""Reconstruction metrics against closed forms and a float64 numpy reference."""

import math

import numpy as np
import pytest
import torch

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.evaluation import reconstruction
from sae.evaluation.reconstruction import ReconstructionMetrics, add_reconstruction


def random_dictionary(d: int, f: int, seed: int = 0) -> Dictionary:
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randn(*shape, generator=g) for shape in [(f, d), (f,), (f, d), (d,)]]
    return Dictionary.autoencoder(draw[0] / d**0.5, draw[1] - 1, draw[2] / d, draw[3]).requires_grad_(False)


def by_numpy(x, dictionary):
    """Every number once more, all rows at once, in float64."""
    x = x.double().numpy()
    W_enc, b_enc, W_dec, b_dec = (getattr(dictionary, name).double().numpy() for name in ("W_enc_fd", "b_enc_f", "W_dec_fo", "b_dec_o"))
    acts = np.maximum((x - b_dec) @ W_enc.T + b_enc, 0)
    y = acts @ W_dec + b_dec
    error, total = ((x - y) ** 2).sum(), ((x - x.mean(0)) ** 2).sum()
    return {
        "fvu": error / total,
        "explained_variance": 1 - error / total,
        "explained_second_moment": 1 - error / (x**2).sum(),
        "mse": error / len(x),
        "l0": (acts > 0).sum() / len(x),
        "l1": (acts * np.linalg.norm(W_dec, axis=1)).sum() / len(x),
        "cosine": np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y)]),
        "norm_ratio": np.linalg.norm(y, axis=1).mean() / np.linalg.norm(x, axis=1).mean(),
        "relative_bias": (y * y).sum() / (x * y).sum(),
        "dead": ((acts > 0).sum(0) == 0).sum(),
        "dense": ((acts > 0).mean(0) > 0.1).sum(),
        "density_f": (acts > 0).mean(0),
        "mean_d": x.mean(0),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_metric_equals_numpy_in_float64(dtype):
    dictionary = random_dictionary(12, 40)
    x_bd = (torch.randn(301, 12) * 2 + 3).to(dtype)
    result = add_reconstruction(dictionary, x_bd).result()._asdict()
    for name, expected in by_numpy(x_bd, dictionary).items():
        np.testing.assert_allclose(np.asarray(result[name], dtype=np.float64), expected, rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("mean_over_std", [0, 1, 10, 1e4])
def test_explained_variance_is_not_flattered_by_a_large_mean(mean_over_std):
    """x̂ = x plus noise of 0.36 of the variance, with exact closed form 0.64 at every mean."""
    g = torch.Generator().manual_seed(1)
    x_bd = torch.randn(20_000, 32, generator=g, dtype=torch.float64)
    noise_bd = 0.6 * torch.randn(20_000, 32, generator=g, dtype=torch.float64)
    mean_d = torch.randn(32, generator=g, dtype=torch.float64)
    x_bd = x_bd + mean_d / mean_d.square().mean().sqrt() * mean_over_std
    metrics = ReconstructionMetrics(torch.ones(1), 32)
    metrics.add(x_bd, torch.zeros(20_000, 1), x_bd + noise_bd)
    result = metrics.result()
    assert result.explained_variance == pytest.approx(0.64, abs=0.005)
    uncentred = 1 - 0.36 / (1 + mean_over_std**2)
    assert result.explained_second_moment == pytest.approx(uncentred, abs=0.005)


def test_perfect_and_constant_reconstructions():
    x_bd = torch.randn(500, 8) + 5
    metrics = ReconstructionMetrics(torch.ones(3), 8)
    metrics.add(x_bd, torch.ones(500, 3), x_bd)
    perfect = metrics.result()
    assert (perfect.fvu, perfect.mse, perfect.l0, perfect.dead, perfect.dense) == (0, 0, 3, 0, 3)
    assert (perfect.norm_ratio, perfect.relative_bias) == (pytest.approx(1), pytest.approx(1))
    metrics = ReconstructionMetrics(torch.ones(3), 8)
    metrics.add(x_bd, torch.zeros(500, 3), x_bd.double().mean(0).expand(500, 8))
    constant = metrics.result()
    assert constant.fvu == pytest.approx(1)  # the mean explains nothing
    assert (constant.l0, constant.dead, constant.dense) == (0, 3, 0)


def test_halved_reconstruction_shows_as_shrinkage():
    x_bd = torch.randn(500, 8)
    metrics = ReconstructionMetrics(torch.ones(1), 8)
    metrics.add(x_bd, torch.zeros(500, 1), x_bd / 2)
    result = metrics.result()
    assert (result.norm_ratio, result.relative_bias, result.cosine) == tuple(pytest.approx(v) for v in (0.5, 0.5, 1))


def test_chunks_and_merges_give_the_numbers_of_one_pass(monkeypatch):
    dictionary = random_dictionary(6, 20)
    x_bd = torch.randn(257, 6) + 100
    whole = add_reconstruction(dictionary, x_bd).result()
    monkeypatch.setattr(reconstruction, "CHUNK_BYTES", 4 * 20 * 7)  # seven rows at a time
    first, second = add_reconstruction(dictionary, x_bd[:31]), add_reconstruction(dictionary, x_bd[31:])
    second.merge(first)
    for name, value in second.result()._asdict().items():
        expected = getattr(whole, name)
        if name == "l0_percentiles":
            assert value == expected
        else:
            np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=1e-5, err_msg=name)


def test_l0_percentiles_are_those_of_the_rows():
    metrics = ReconstructionMetrics(torch.ones(100), 2)
    counts = torch.arange(1, 101)  # row i fires i features
    acts_bf = (torch.arange(100) < counts[:, None]).float()
    metrics.add(torch.randn(100, 2), acts_bf, torch.zeros(100, 2))
    assert metrics.result().l0_percentiles == {"5": 5, "25": 25, "50": 50, "75": 75, "95": 95}


def test_zero_vectors_give_zero_cosine_and_no_ratio():
    metrics = ReconstructionMetrics(torch.ones(1), 4)
    metrics.add(torch.zeros(3, 4), torch.zeros(3, 1), torch.zeros(3, 4))
    result = metrics.result()
    assert result.cosine == 0
    assert math.isnan(result.fvu)
    assert math.isnan(result.relative_bias)


def test_nan_and_no_rows_are_refused():
    metrics = ReconstructionMetrics(torch.ones(1), 4)
    with pytest.raises(InputError, match="at least one row"):
        metrics.result()
    metrics.add(torch.full((3, 4), float("nan")), torch.zeros(3, 1), torch.zeros(3, 4))
    with pytest.raises(InputError, match="finite"):
        metrics.result()
