"""A feature's direction against the dictionary's own decoding."""

import pytest
import torch

from sae.dictionary import SparseAutoencoder
from sae.errors import InputError
from steering.directions.feature import feature_direction


def dictionary(metadata=None) -> SparseAutoencoder:
    torch.manual_seed(3)
    return SparseAutoencoder(torch.randn(6, 32), torch.zeros(6), 3 * torch.randn(6, 32), torch.randn(32), metadata)


def test_strength_one_is_what_the_feature_adds_at_its_maximum():
    sae = dictionary({"site": "resid_post.1", "model_name": "m"})
    made = feature_direction(sae, 4, 2.5)
    acts_f = torch.zeros(6)
    silent = sae.decode(acts_f)
    acts_f[4] = 2.5
    torch.testing.assert_close(made.direction_d, (sae.decode(acts_f) - silent).detach(), rtol=1e-5, atol=1e-5)
    assert made.site == "resid_post.1"
    assert made.provenance == {"method": "feature", "feature": 4, "max_activation": 2.5, "model": "m"}


def test_features_that_cannot_steer():
    sae = dictionary()
    for feature, highest, site, sentence in [
        (6, 1.0, "resid_post.1", "features 0 to 5"),
        (-1, 1.0, "resid_post.1", "features 0 to 5"),
        (2, 0.0, "resid_post.1", "never fires"),
        (2, float("nan"), "resid_post.1", "never fires"),
        (2, 1.0, None, "name its site"),
    ]:
        with pytest.raises(InputError, match=sentence):
            feature_direction(sae, feature, highest, site)
