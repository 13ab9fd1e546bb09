"""The steering command: a prompt's continuation without and with a dictionary feature added."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from sae.disk.writing import jsonable
from sae.errors import InputError
from sae.features.browser.serve import parts_of
from sae.features.index.reader import FeatureIndex
from sae.model.language_model import LanguageModel, NonFiniteLogits
from sae.model.sampling import Sampling
from steering.directions.feature import feature_direction, first_found
from steering.intervention import steered
from steering.strength.measure import continuation_loss, until_end, word_rate
from steering.vector import SteeringVector

SIDE_BY_SIDE = 80  # columns of a terminal below which two columns of text become unreadable


@dataclass(kw_only=True)
class PartsConfig:
    index: Path
    """Folder of the feature index: it knows each feature's maximum activation."""
    dictionary: str | None = None
    """Folder, file or hub name of the dictionary. Default: the one the index was built from."""
    model: str | None = None
    """Model by hub name, folder or GGUF file. Default: the one the index names."""
    feature: int | None = None
    """Feature to add (give this or --search)."""
    search: str | None = None
    """Add the first feature that the index lists for this word ("one|two" for several)."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto takes a GPU when there is one."""


class SteeringParts(NamedTuple):
    lm: LanguageModel
    feature: int
    max_activation: float
    vector: SteeringVector
    """at strength 1"""


@dataclass(kw_only=True)
class SteerConfig(PartsConfig):
    strength: float = 1.0
    """1 is the feature's own maximum activation; negative steers away."""
    prompt: str = ""
    """Text to continue."""
    samples: int = 3
    """Continuations of each kind."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    positions: Literal["all", "generated"] = "all"
    """Where to add: every position, or only those that choose generated tokens."""
    json: bool = False
    """Print one JSON object instead of a table."""


def steer(config: SteerConfig) -> dict[str, Any]:
    """Prints both kinds of text, and gives them with the strengths and measures as plain values.

    Raises `InputError` when the parts do not belong together or the feature cannot steer.
    """
    if not math.isfinite(config.strength) or config.samples < 1:
        raise InputError(f"expected a finite strength and at least one sample, got {config.strength} and {config.samples}")
    lm, feature, max_activation, vector = load_steering_parts(config)
    report = compare_texts(lm, vector, config)
    report = {"feature": feature, "max_activation": max_activation, "activation": config.strength * max_activation, **report}
    if config.json:
        print(json.dumps(jsonable(report), indent=1))
    else:
        print_sides(report)
    return report


def load_steering_parts(config: PartsConfig) -> SteeringParts:
    """Model, feature and direction, or `InputError` if index, dictionary and model were not made with one another."""
    if (config.feature is None) == (config.search is None):
        raise InputError("expected either --feature or --search, got both or neither; give one of them")
    index = FeatureIndex.open(config.index)
    feature = config.feature if config.feature is not None else first_found(index, config.search or "")
    index.feature(feature)  # a wrong number is said before the model is loaded
    lm, dictionary = parts_of(index, config.dictionary, config.model, config.device)
    max_activation = float(index.feature(feature).columns["max"])
    return SteeringParts(lm, feature, max_activation, feature_direction(dictionary, feature, max_activation, index.info["site"]))


def compare_texts(lm: LanguageModel, vector: SteeringVector, config: SteerConfig) -> dict[str, Any]:
    """Continuations without and with `strength` times the vector, and what can be measured of both."""
    ids_sp, mask_sp = lm.encode([config.prompt])
    ids_sp, mask_sp = (x.expand(config.samples, -1) for x in (ids_sp, mask_sp))
    prompt_length = ids_sp.shape[1]
    plain_sp = lm.generate(ids_sp, mask_sp, **vars(config.sampling))
    positions: dict[str, Any] = {"positions": config.positions}
    if config.positions == "generated":
        positions["prompt_length"] = prompt_length
    failure, steered_sp = None, None
    try:
        with steered(lm, [(vector, config.strength)], **positions):
            steered_sp = lm.generate(ids_sp, mask_sp, **vars(config.sampling))
    except (NonFiniteLogits, OverflowError) as error:
        failure = f"no text: {error}; strength {config.strength:g} is more than the model's arithmetic can carry"
    return {
        "strength": config.strength,
        "relative_to_residual_norm": abs(config.strength) * vector.norm / typical_norm(lm, vector.site, plain_sp, prompt_length),
        "site": vector.site,
        "prompt": config.prompt,
        "unsteered": measured_side(lm, ids_sp, plain_sp, config.search),
        "steered": None if steered_sp is None else measured_side(lm, ids_sp, steered_sp, config.search),
        "failure": failure,
    }


def typical_norm(lm: LanguageModel, site: str, whole_sp: Tensor, prompt_length: int) -> float:
    """Median norm at the site over the tokens of a text, without its first one, whose norm is often far from any other's."""
    norm_sp = lm.record(whole_sp, [site])[site].float().norm(dim=-1)
    new_sn = until_end(lm, whole_sp[:, prompt_length:]).to(norm_sp.device)
    return torch.cat([norm_sp[0, 1:prompt_length], norm_sp[:, prompt_length:][new_sn]]).median().item()  # host sync


def measured_side(lm: LanguageModel, prompt_sp: Tensor, whole_sp: Tensor, word: str | None) -> dict[str, Any]:
    """Continuations as text, their loss under the unsteered model, and, if a word was searched for, how often it comes."""
    from sae.features.index.words import words_of

    start = len(lm.tokenizer.decode(prompt_sp[0], skip_special_tokens=True))
    texts = [text[start:] for text in lm.tokenizer.batch_decode(whole_sp, skip_special_tokens=True)]
    report: dict[str, Any] = {"texts": texts, "nats_per_token": continuation_loss(lm, prompt_sp, whole_sp[:, prompt_sp.shape[1] :])}
    if word is not None:
        rate = word_rate(texts, words_of(word))
        report |= {"word_count": rate.found, "words": rate.words}
    return report


def print_sides(report: dict[str, Any]) -> None:
    """The report as text in a terminal: two columns where they fit, else one under the other."""
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(file=sys.stdout)
    console.print(Text(f"feature {report['feature']} at {report['site']}", style="bold"))
    console.print(
        Text(
            f"strength {report['strength']:g} = {report['strength']:g} x its maximum activation ({report['max_activation']:.3g}), "
            f"an activation of {report['activation']:.3g}, {report['relative_to_residual_norm']:.3g} x the residual norm there"
        )
    )
    console.print(Text(f"prompt: {report['prompt'] or '(none)'}"))
    heads, bodies = ["unsteered", "steered"], []
    for side in heads:
        if report[side] is None:
            bodies.append([Text(report["failure"], style="red")])
            continue
        texts: list[Any] = [Text(f"{i}. {text.strip()}\n") for i, text in enumerate(report[side]["texts"], 1)]
        facts = f"{report[side]['nats_per_token']:.2f} nats per token under the unsteered model"
        if "word_count" in report[side]:
            facts += f"; the word {report[side]['word_count']} times in {report[side]['words']} words"
        bodies.append([*texts, Text(facts, style="dim")])
    if console.width >= SIDE_BY_SIDE:
        table = Table(*(Column(head, ratio=1, overflow="fold") for head in heads), expand=True)
        table.add_row(*(Group(*body) for body in bodies))
        console.print(table)
    else:
        for head, body in zip(heads, bodies):
            console.print(Panel(Group(*body), title=head, title_align="left"))
