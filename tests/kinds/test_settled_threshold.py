"""The threshold that keeps k per row, against sorting all pre-activations."""

import pytest
import torch
from meshes import together

from sae.dictionaries.dictionary import Dictionary
from sae.kinds.batchtopk import threshold_for


def world(bias):
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(96, 12, generator=generator), torch.randn(96, 12, generator=generator)
    return (W_enc, torch.full((96,), bias), W_dec, torch.zeros(12)), torch.randn(500, 12, generator=generator)


@pytest.mark.parametrize("bias", [0.0, -4.0, -12.0])  # many, few more and fewer than 5 of a row are above 0
@pytest.mark.parametrize("running", [0.0, 1.0, 4.0, 100.0])
def test_it_is_the_largest_value_after_the_first_k_of_all_rows(bias, running):
    weights, x = world(bias)
    dictionary = Dictionary(*weights)
    threshold, count, active = threshold_for(dictionary, x.split(150), 5, running)
    z_n = dictionary.pre_activations(x).detach().relu().flatten().sort(descending=True).values
    assert count == 500
    assert threshold == float(z_n[2500])
    assert active == int((z_n > running).sum()) / 500


def test_processes_with_parts_of_the_features_find_the_same():
    (W_enc, b_enc, W_dec, b_dec), x = world(-4.0)
    whole = threshold_for(Dictionary(W_enc, b_enc, W_dec, b_dec), x.split(150), 5, 2.0)

    def find(mesh):
        part = mesh.every.part(96)
        own = Dictionary(W_enc[part], b_enc[part], W_dec[part], b_dec)
        assert threshold_for(own, x.split(150), 5, 2.0, mesh.every) == pytest.approx(whole, rel=1e-6)

    together(2, 1, find)
