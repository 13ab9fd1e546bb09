"""The direction of one dictionary feature."""

from sae.dictionary import SparseAutoencoder
from sae.errors import InputError
from steering.vector import SteeringVector


def feature_direction(dictionary: SparseAutoencoder, feature: int, max_activation: float, site: str | None = None) -> SteeringVector:
    """v = a_max · W_dec[feature], so that coefficient 1 adds what the feature adds to a reconstruction at its highest activation.

    `max_activation` is in the dictionary's own units (activations times decoder rows), whatever the norm of its rows. `site` is needed
    only if the dictionary does not say where it was trained. (Templeton et al. 2024 steer in the same unit, but clamp: they set the
    activation instead of adding to it.) Raises `InputError` for a feature that does not exist or never fires.
    """
    if not 0 <= feature < dictionary.d_sae:
        raise InputError(f"feature {feature} does not exist: the dictionary has features 0 to {dictionary.d_sae - 1}")
    if not max_activation > 0:
        raise InputError(f"feature {feature} never fires (maximum activation {max_activation}), so it has no strength to steer with")
    site = site or dictionary.site
    if site is None:
        raise InputError("expected the dictionary's metadata to name its site, such as resid_post.2, found none; give the site")
    provenance = {
        "method": "feature",
        "feature": feature,
        "max_activation": max_activation,
        "model": dictionary.metadata.get("model_name"),
    }
    return SteeringVector(site, max_activation * dictionary.W_dec_fd[feature].float(), provenance)
