"""Opens a dictionary for a loaded model."""

from pathlib import Path

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel


def load_dictionary(source: str | Path, lm: LanguageModel, site: str | None = None) -> tuple[Dictionary, str]:
    """The dictionary on the model's device, and its site, or `site` where it does not name its own.

    For comparing directions at one site. Raises `InputError` for a dictionary of another site, width or model, for a transcoder, and for
    one whose vectors differ from token to token.
    """
    dictionary = Dictionary.load(source, lm.device)
    if dictionary.is_transcoder or (dictionary.frame is not None and dictionary.frame.kind != "centred"):
        what = (
            f"{dictionary.site_out} from {dictionary.site}" if dictionary.is_transcoder else f"in units of each token ({dictionary.frame})"
        )
        raise InputError(
            f"expected a dictionary that writes fixed vectors where it reads, but the one in {source} writes {what}; "
            "steer with its features by clamping them"
        )
    site = dictionary.require_site(site)
    if dictionary.d_in != lm.width(site):
        raise InputError(f"expected a dictionary of width {lm.width(site)} for {site} of {lm.name!r}, got {dictionary.d_in} in {source}")
    dictionary.require_model(lm.name, lm.fingerprint(), named=True)  # every command here is given its model
    return dictionary, site
