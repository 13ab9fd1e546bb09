"""The parts for steering with one dictionary feature: the model, the direction, and the activation that counts as strength 1.

n rows (tokens of a text) · d width of a site
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sae.activations.harvest.massive import is_massive
from sae.activations.text.documents import TextConfig
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.neuronpedia import posted
from sae.errors import InputError
from sae.evaluation.check.check import TEXT
from sae.evaluation.check.recording import Point, Recorder, read_sequences
from sae.features.browser.serve import parts_of
from sae.features.exports.neuronpedia import maximum_activation
from sae.features.index.reader import FeatureIndex
from sae.model.language_model import LanguageModel
from steering.directions.feature import feature_direction, first_found
from steering.vector import SteeringVector

CALIBRATION_TOKENS = 20_000


@dataclass(kw_only=True)
class PartsConfig:
    index: Path | None = None
    """Folder of the feature index, which has each feature's maximum activation. Default: none; then give --dictionary and --model."""
    dictionary: str | None = None
    """Folder, file or hub name of the dictionary. Default: the one the index was built from, or that of --feature's URL."""
    model: str | None = None
    """Model by hub name, folder or GGUF file. Default: the one the index names, or that of --feature's URL."""
    feature: str | None = None
    """Number of the feature to add; or its Neuronpedia URL, or model/source/number from that URL, which name the dictionary too."""
    search: str | None = None
    """Instead of --feature: the first feature that the index lists for this word ("one|two" for several)."""
    site: str | None = None
    """Site, such as resid_post.2, if the dictionary names none. Default: the dictionary's own."""
    neuronpedia: Path | None = None
    """Folder of Neuronpedia's export of the dictionary, for the feature's maximum activation if there is no index."""
    text: tuple[str, ...] = ()
    """Text to find the feature's maximum activation on, if there is no index and no export. Default: a short text of the package."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""


class SteeringParts(NamedTuple):
    lm: LanguageModel
    feature: int
    max_activation: float | None
    """None if it is unknown and an absolute activation was given"""
    vector: SteeringVector
    """at strength 1: the maximum activation, or an activation of 1 if that is None"""


def load_steering_parts(config: PartsConfig, *, absolute: bool = False) -> SteeringParts:
    """Model, feature and direction. `absolute` says that the strength is an activation, so that no maximum need be found without an index.

    Raises `InputError` for flags that do not go together, parts that were not made with one another, and a feature that never fires.
    """
    if (config.feature is None) == (config.search is None):
        raise InputError("expected either --feature or --search, got both or neither; give one of them")
    return _without_index(config, absolute) if config.index is None else _of_index(config, config.index)


def _of_index(config: PartsConfig, folder: Path) -> SteeringParts:
    for name in ("site", "neuronpedia", "text"):
        if getattr(config, name):
            raise InputError(f"--{name} is for steering without an index, got --index too; leave one of them out")
    index = FeatureIndex.open(folder)
    feature = _number(config.feature) if config.feature is not None else first_found(index, config.search or "")
    if feature is None:
        raise InputError(f"expected the number of a feature of {folder}, got {config.feature!r}; leave out --index to use that dictionary")
    index.feature(feature)  # a wrong number is refused before the model is loaded
    lm, dictionary = parts_of(index, config.dictionary, config.model, config.device)
    highest = index.feature(feature).maximum
    return SteeringParts(lm, feature, highest, feature_direction(dictionary, feature, highest, index.info["site"]))


def _without_index(config: PartsConfig, absolute: bool) -> SteeringParts:
    if config.feature is None:
        raise InputError("--search looks in an index, got none; give --index, or --feature with a number")
    if config.neuronpedia and config.text:
        raise InputError("expected one source of the maximum activation, got --neuronpedia and --text; leave one of them out")
    source, model, feature = config.dictionary, config.model, _number(config.feature)
    if feature is None:
        found = posted(config.feature)
        if found.feature is None:
            raise InputError(f"expected a feature's number at the end of {config.feature}, found none; add it")
        source, model, feature = source or found.dictionary, model or found.model, found.feature
        print(f"feature {feature} of {source}, on {model}", file=sys.stderr)
    if source is None or model is None:
        raise InputError("expected --index, or --dictionary and --model, or --feature with a URL of Neuronpedia; give one of these")
    highest = maximum_activation(config.neuronpedia, feature) if config.neuronpedia else None
    lm = LanguageModel.load(model, device=config.device)
    dictionary = Dictionary.load(source, lm.device)
    dictionary.require_feature(feature)
    dictionary.require_model(lm.name, lm.fingerprint(), named=True)  # by the user, or by the list of Neuronpedia's names
    site = dictionary.require_site(config.site)
    if dictionary.d_in != lm.width(site):
        raise InputError(f"expected a dictionary {lm.width(site)} wide for {site} of {lm.name}, got one for {dictionary.d_in} in {source}")
    if highest is not None and dictionary.gate.signed:
        raise InputError(
            "expected a dictionary without negative activations for --neuronpedia, whose export has the maximum without its sign, got "
            f"{source}; leave it out, or give --text or --index"
        )
    if highest is None and (config.text or not absolute):
        highest = found_maximum(lm, dictionary, feature, site, config.text)
    return SteeringParts(lm, feature, highest, feature_direction(dictionary, feature, 1.0 if highest is None else highest, site))


def _number(feature: str | int) -> int | None:
    try:
        return int(feature)
    except ValueError:
        return None


@torch.no_grad()
def found_maximum(lm: LanguageModel, dictionary: Dictionary, feature: int, site: str, text: tuple[str, ...] = ()) -> float:
    """The feature's strongest activation on a text, with its sign; beginning-of-text tokens and massive rows are left out. A line on stderr
    describes the text.

    Raises `InputError` if it does not fire.
    """
    name = ", ".join(text) or "the package's own text"
    recorder = Recorder(lm, read_sequences(lm, TextConfig(text=text or (str(TEXT),)), CALIBRATION_TOKENS))
    x_nd = recorder.values(Point(site, lm.bos_id is not None and bool(dictionary.metadata.get("prepend_bos", True))))
    x_nd = x_nd[~is_massive(x_nd.norm(dim=-1))]
    parts = [dictionary.activations(part_nd.to(lm.device), [feature])[:, 0] for part_nd in x_nd.split(1024)]
    activation_n = torch.cat(parts).float().cpu().numpy()  # host sync
    highest, fires = float(activation_n[np.abs(activation_n).argmax()]), int((activation_n != 0).sum())
    if not fires:
        raise InputError(
            f"expected feature {feature} to fire on {name}, but it does not on any of its {len(activation_n):,} tokens; give --text "
            "on which it does, --neuronpedia with its export, or --activation instead of --strength"
        )
    print(
        f"the strongest activation of feature {feature} on {name} is {highest:.4g}: it fires on {fires:,} of {len(activation_n):,} tokens; "
        "a longer text can hold a stronger one",
        file=sys.stderr,
    )
    return highest
