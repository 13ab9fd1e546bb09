"""Steering vectors: arithmetic and files."""

import pytest
import torch
from safetensors.torch import save_file

from sae.errors import InputError
from steering.vector import SteeringVector


def vector(site: str, seed: int = 0, width: int = 32) -> SteeringVector:
    return SteeringVector(site, torch.randn(width, generator=torch.Generator().manual_seed(seed)), {"seed": seed})


def test_vector_arithmetic_is_that_of_its_direction():
    one, two = vector("mlp_out.1", 0), vector("mlp_out.1", 1)
    total = 3 * one + two * 0.5
    torch.testing.assert_close(total.direction_d, one.direction_d * 3 + two.direction_d / 2)
    assert total.provenance == {"sum": [{"factor": 3, "of": {"seed": 0}}, {"factor": 0.5, "of": {"seed": 1}}]}
    assert total.norm == pytest.approx(total.direction_d.double().square().sum().sqrt().item(), rel=1e-6)
    for other in (vector("mlp_out.0"), vector("mlp_out.1", width=16)):
        with pytest.raises(InputError, match="one site and width"):
            one + other
    with pytest.raises(InputError, match="finite factor"):
        float("nan") * one
    with pytest.raises(InputError, match="finite numbers"):
        SteeringVector("mlp_out.1", torch.tensor([1.0, float("inf")]))


def test_vector_survives_its_file(tmp_path):
    saved = vector("resid_post.1")
    saved.save(tmp_path / "some" / "vector.safetensors")
    loaded = SteeringVector.load(tmp_path / "some" / "vector.safetensors")
    assert torch.equal(loaded.direction_d, saved.direction_d)
    assert (loaded.site, loaded.provenance) == (saved.site, saved.provenance)


def test_unusable_vector_files(tmp_path):
    vector("resid_post.1").save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-20])
    save_file({"weights": torch.ones(2)}, tmp_path / "other")
    for name, sentence in {"absent": "does not exist", "cut": "no whole safetensors", "other": "got a file with weights"}.items():
        with pytest.raises(InputError, match=sentence):
            SteeringVector.load(tmp_path / name)
