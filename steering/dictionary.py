"""A dictionary, opened for a model that is already there."""

from pathlib import Path

from sae.dictionary import SparseAutoencoder
from sae.errors import InputError
from sae.language_model import LanguageModel


def load_dictionary(folder: Path, lm: LanguageModel, site: str | None = None) -> tuple[SparseAutoencoder, str]:
    """The dictionary on the model's device, and its site, or `site` where it does not name its own.

    Raises `InputError` for a dictionary of another site, width or model.
    """
    dictionary = SparseAutoencoder.load(folder, lm.device)
    site = dictionary.require_site(site)
    if dictionary.d_in != lm.width(site):
        raise InputError(f"expected a dictionary of width {lm.width(site)} for {site} of {lm.name!r}, got {dictionary.d_in} in {folder}")
    dictionary.require_model(lm.name, lm.fingerprint(), named=True)  # every command here is given its model
    return dictionary, site
