"""The dictionary with the changes that were found, as far as a folder can record them."""

from typing import Any

from sae.dictionaries.dictionary import Dictionary
from sae.evaluation.check.alternatives import Use
from sae.evaluation.check.recording import Recorder

INEXPRESSIBLE = {"post_norm": "a site ahead of a norm", "positions": "positions that are left out"}
"""kinds of changes that a folder cannot record"""

REWRITTEN = {"hook_name", "hook_layer", "hook_name_out", "hf_hook_name", "model_from_pretrained_kwargs"}
"""facts that are replaced by our names of sites and the model at hand"""


def inexpressible(use: Use) -> list[str]:
    """The changes that a folder cannot record."""
    return [INEXPRESSIBLE[change.kind] for change in use.changes if change.kind in INEXPRESSIBLE]


def corrected(use: Use, recorder: Recorder) -> Dictionary:
    """The dictionary at its sites, with the model named that it was checked with. Changes that a folder cannot record are left out."""
    parts = use.dictionary.parts()
    lm = recorder.model(use.reads)
    metadata: dict[str, Any] = {key: value for key, value in parts.metadata.items() if key not in REWRITTEN}
    metadata |= {"site": use.reads.site, "prepend_bos": use.reads.bos}
    metadata |= {"model_name": lm.name, "model_revision": lm.revision, "model_fingerprint": lm.fingerprint()}
    if use.writes != use.reads:
        metadata["site_out"] = use.writes.site
    if use.changes:
        metadata["changed"] = use.name
    return Dictionary.of(parts._replace(metadata=metadata))
