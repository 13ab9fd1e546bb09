"""Fitted effects and targeted directions in worlds whose answer is known."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from sae.errors import InputError
from steering.directions.targeted import Effects, fit_effects, targeted_direction


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_world_is_found_exactly():
    x_kd, M_df, b_f = normal(60, 8, seed=1), normal(8, 30, seed=2), normal(30, seed=3)
    found = fit_effects(x_kd, x_kd @ M_df + b_f, "resid_post.1", {"model": "m"})
    torch.testing.assert_close(found.M_df, M_df, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.b_f, b_f, atol=1e-4, rtol=0)
    assert found.provenance["left_out_explained"] == pytest.approx(1, abs=1e-6)
    assert found.provenance["directions"] == 60
    assert found.provenance["model"] == "m"


def test_the_fit_is_the_minimum_that_gradient_descent_goes_to():
    x_kd, y_kf = normal(40, 5, seed=1), normal(40, 7, seed=2) + 1
    found = fit_effects(x_kd, y_kf, "resid_post.1")
    penalty = found.provenance["ridge"] * 40 * float(x_kd.double().var(0, correction=0).mean())
    M_df, b_f = torch.zeros(5, 7, requires_grad=True), torch.zeros(7, requires_grad=True)
    descent = torch.optim.LBFGS([M_df, b_f], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        descent.zero_grad()
        value = (x_kd @ M_df + b_f - y_kf).square().sum() + penalty * M_df.square().sum()
        value.backward()
        return value

    descent.step(loss)
    torch.testing.assert_close(found.M_df, M_df.detach(), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.b_f, b_f.detach(), atol=1e-3, rtol=0)


def test_the_share_explained_is_that_of_directions_left_out_one_by_one():
    x_kd, M_df = normal(25, 6, seed=1), normal(6, 4, seed=2)
    y_kf = x_kd @ M_df + 2 * normal(25, 4, seed=3)
    found = fit_effects(x_kd, y_kf, "resid_post.1").provenance
    x, y = x_kd.double().numpy(), y_kf.double().numpy()
    penalty = found["ridge"] * len(x) * x.var(axis=0).mean()
    errors = []
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        errors.append((Ridge(penalty).fit(x[rest], y[rest]).predict(x[i : i + 1])[0] - y[i]) ** 2)
    assert found["left_out_explained"] == pytest.approx(1 - np.mean(errors) / y.var(axis=0).mean(), rel=1e-3)


def test_a_targeted_direction_moves_its_feature_and_not_what_any_steering_moves():
    d = 6
    # Feature 0's own row has a large side effect on feature 1, which every steering raises as well.
    M_df = torch.zeros(d, 3)
    M_df[0, 0], M_df[1, 0], M_df[1, 1], M_df[2, 2] = 1.0, 0.5, 4.0, 1.0
    effects = Effects(M_df, torch.tensor([0.0, 1.0, 0.0]), "resid_post.1", {})
    plain, aimed = targeted_direction(effects, 0, 0.0), targeted_direction(effects, 0)
    torch.testing.assert_close(plain.direction_d, torch.nn.functional.normalize(M_df[:, 0], dim=0))
    own_d, bias_d = M_df[:, 0] / M_df[:, 0].norm(), torch.eye(d)[1]  # M b points along the second axis
    torch.testing.assert_close(aimed.direction_d, torch.nn.functional.normalize(own_d - bias_d, dim=0))
    moved, moved_plain = aimed.direction_d @ M_df, plain.direction_d @ M_df
    assert moved[0] > 0
    assert moved[1] < 0 < moved_plain[1]
    assert aimed.norm == pytest.approx(1)
    assert aimed.site == "resid_post.1"
    assert aimed.provenance["feature"] == 0
    assert aimed.provenance["bias_weight"] == 1.0


def test_without_any_bias_there_is_nothing_to_turn_away_from():
    effects = Effects(normal(5, 4), torch.zeros(4), "resid_post.0", {})
    torch.testing.assert_close(targeted_direction(effects, 2).direction_d, targeted_direction(effects, 2, 0.0).direction_d)


def test_saved_and_read_again(tmp_path):
    effects = Effects(normal(5, 4, seed=1), normal(4, seed=2), "resid_post.2", {"kl": 0.3, "features": [1, 2]})
    effects.save(tmp_path / "e.safetensors")
    again = Effects.load(tmp_path / "e.safetensors")
    assert torch.equal(again.M_df, effects.M_df)
    assert torch.equal(again.b_f, effects.b_f)
    assert (again.site, again.provenance) == (effects.site, effects.provenance)
    targeted_direction(again, 1).save(tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="the array 'M' in"):
        Effects.load(tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        Effects.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "e.safetensors").read_bytes()[:60])
    with pytest.raises(InputError, match="no safetensors file"):
        Effects.load(tmp_path / "cut.safetensors")


def test_bad_input_is_met_with_a_sentence():
    with pytest.raises(InputError, match="at least 3 directions"):
        fit_effects(normal(2, 4), normal(2, 5), "resid_post.1")
    with pytest.raises(InputError, match="finite"):
        fit_effects(normal(5, 4), torch.full((5, 2), float("nan")), "resid_post.1")
    with pytest.raises(InputError, match="differ"):
        fit_effects(normal(5, 4), torch.ones(5, 2), "resid_post.1")
    effects = Effects(torch.eye(4)[:, :3] * torch.tensor([1.0, 0.0, 1.0]), torch.ones(3), "resid_post.1", {})
    with pytest.raises(InputError, match="feature 3 does not exist"):
        targeted_direction(effects, 3)
    with pytest.raises(InputError, match="feature 1 was moved by none"):
        targeted_direction(effects, 1)
    with pytest.raises(InputError, match="rises exactly as under any steering"):
        targeted_direction(Effects(torch.eye(4)[:, :1], torch.ones(1), "resid_post.1", {}), 0)
