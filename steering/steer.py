"""The steering command: a prompt's continuation without and with a dictionary feature, or a vector from a file, added."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from sae.disk.writing import jsonable
from sae.errors import InputError
from sae.model.language_model import LanguageModel, NonFiniteLogits
from sae.model.sampling import Sampling
from steering.intervention import steered
from steering.parts import PartsConfig, load_steering_parts
from steering.strength.measure import continuation_loss, until_end, word_rate
from steering.vector import SteeringVector

SIDE_BY_SIDE = 80  # columns of a terminal below which two columns of text become unreadable


@dataclass(kw_only=True)
class SteerConfig(PartsConfig):
    vector: Path | None = None
    """Instead of a feature: file of a steering vector, such as find-circuit --features writes; strength 1 adds it as it is."""
    strength: float | None = None
    """Multiple of the feature's own maximum activation, its strongest, which may be negative (AbsTopK); negative multiples steer away from
    it. Default: 1."""
    activation: float | None = None
    """Instead of --strength: the activation to add, with its sign."""
    prompt: str = ""
    """Text to continue."""
    samples: int = 3
    """Number of continuations, each without and with steering."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    positions: Literal["all", "generated"] = "all"
    """Where to add: at every position, or only at those that predict generated tokens."""
    json: bool = False
    """Print one JSON object instead of a table."""


def steer(config: SteerConfig) -> dict[str, Any]:
    """Prints both kinds of text, and returns them with the strengths and measures as plain values.

    Raises `InputError` when the parts do not belong together or the feature cannot steer.
    """
    if config.strength is not None and config.activation is not None:
        raise InputError("expected --strength or --activation, got both; leave one of them out")
    given = config.activation if config.activation is not None else 1.0 if config.strength is None else config.strength
    if not math.isfinite(given) or config.samples < 1:
        raise InputError(f"expected a finite strength and at least one sample, got {given} and {config.samples}")
    if config.vector is not None:
        lm, vector = _of_file(config, config.vector)
        report = {"vector": str(config.vector), "strength": given, **compare_texts(lm, vector, given, config)}
    else:
        lm, feature, max_activation, vector = load_steering_parts(config, absolute=config.activation is not None)
        unit = max_activation or 1.0
        coefficient = given if config.activation is None else given / unit
        strength = None if max_activation is None else coefficient
        numbers = {"feature": feature, "max_activation": max_activation, "activation": coefficient * unit, "strength": strength}
        report = numbers | compare_texts(lm, vector, coefficient, config)
    if config.json:
        print(json.dumps(jsonable(report), indent=1))
    else:
        print_sides(report)
    return report


def _of_file(config: SteerConfig, path: Path) -> tuple[LanguageModel, SteeringVector]:
    for name in ("index", "dictionary", "feature", "search", "site", "neuronpedia", "text", "activation"):
        if getattr(config, name) not in (None, ()):
            raise InputError(f"--{name} is for steering with a feature, got --vector too; leave one of them out")
    if config.model is None:
        raise InputError("expected --model with --vector, got none; give the model that the vector is for")
    vector = SteeringVector.load(path)
    lm = LanguageModel.load(config.model, device=config.device)
    made = vector.provenance.get("fingerprint")
    if made is not None and made != lm.fingerprint():
        raise InputError(
            f"expected the model of the vector in {path}, with the fingerprint {made}, got {lm.name!r} with {lm.fingerprint()}; give that"
        )
    return lm, vector


def compare_texts(lm: LanguageModel, vector: SteeringVector, coefficient: float, config: SteerConfig) -> dict[str, Any]:
    """Continuations without and with `coefficient` times the vector, and measures of both."""
    ids_sp, mask_sp = lm.encode([config.prompt])
    ids_sp, mask_sp = (x.expand(config.samples, -1) for x in (ids_sp, mask_sp))
    prompt_length = ids_sp.shape[1]
    plain_sp = lm.generate(ids_sp, mask_sp, **vars(config.sampling))
    positions: dict[str, Any] = {"positions": config.positions}
    if config.positions == "generated":
        positions["prompt_length"] = prompt_length
    failure, steered_sp = None, None
    try:
        with steered(lm, [(vector, coefficient)], **positions):
            steered_sp = lm.generate(ids_sp, mask_sp, **vars(config.sampling))
    except (NonFiniteLogits, OverflowError) as error:
        failure = f"no text: {error}; {coefficient * vector.norm:g} times a unit vector is more than the model's arithmetic can carry"
    ratios = [
        abs(coefficient) * direction.norm().item() / typical_norm(lm, site, plain_sp, prompt_length)  # host sync
        for site, direction in vector.directions.items()
    ]
    return {
        "relative_to_residual_norm": max(ratios),
        "site": ", ".join(vector.directions),
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
    """Continuations as text, their loss under the unsteered model, and, if a word was searched for, how often it occurs."""
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
    ratio = f"{report['relative_to_residual_norm']:.3g} x the residual norm there"
    if "vector" in report:
        console.print(Text(f"{report['vector']} at {report['site']}", style="bold"))
        console.print(Text(f"{report['strength']:.3g} x the vector, {ratio}"))
    else:
        console.print(Text(f"feature {report['feature']} at {report['site']}", style="bold"))
        highest = report["max_activation"]
        of_maximum = "" if highest is None else f"{report['strength']:.3g} x its maximum activation ({highest:.3g}): "
        console.print(Text(f"{of_maximum}an activation of {report['activation']:.3g}, {ratio}"))
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
