"""The effect of a feature at several strengths on the rate of listed words and on readability, compared with a random direction.

s sequences · p positions of the prompt · n new tokens · d model width
"""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tyro.conf import OmitArgPrefixes

from sae.disk.places import require_file
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel, NonFiniteLogits
from sae.model.sampling import Sampling
from sae.progress import progress
from sae.statistics import ratio_interval
from sae.text_input import text_list
from steering.intervention import steered
from steering.parts import PartsConfig, load_steering_parts
from steering.strength.measure import continuation_loss, read_words, until_end, word_rate
from steering.strength.neutral import FEW_PROMPTS
from steering.vector import SteeringVector

WORDS = Path(__file__).parents[1] / "words"


@dataclass(kw_only=True)
class StrengthsConfig(PartsConfig):
    words: Path = WORDS / "curse_words.txt"
    """File of the words to count, one per line."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Multiples of the feature's maximum activation."""
    prompts: tuple[str, ...] = FEW_PROMPTS
    """Texts to continue."""
    samples: int = 24
    """Continuations of each prompt at each strength."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    out: Path | None = None
    """JSON file for the table with every continuation."""


class StrengthRow(NamedTuple):
    direction: str
    """"none", "feature", or "random" for a random direction of the feature's norm"""
    strength: float
    found: int
    words: int
    interval: tuple[float, float]
    """95 % of the rate, bootstrap over continuations"""
    nats_per_token: float
    """of the continuations under the unsteered model; NaN if there is no text"""
    distinct_2: float
    """share of different pairs among all pairs of neighbouring tokens"""
    failed_prompts: int
    """prompts without text, because at this strength the model's logits are not finite"""
    texts: list[str]


def strengths(config: StrengthsConfig) -> list[StrengthRow]:
    """Prints the table and returns its rows. Raises `InputError` when the parts do not belong together."""
    if config.samples < 1 or not config.strengths or not text_list(config.prompts, "prompts"):
        raise InputError("expected at least one sample, one strength and one prompt")
    if config.out:
        require_file(config.out)
    words = read_words(config.words)
    lm, feature, _, vector = load_steering_parts(config)
    random_d = torch.randn(lm.width(vector.site), generator=torch.Generator().manual_seed(config.sampling.seed))
    random = SteeringVector.at(vector.site, random_d * vector.norm / random_d.norm(), {"method": "random", "seed": config.sampling.seed})
    arms = [("none", vector, 0.0)]
    arms += [(name, direction, s) for s in config.strengths for name, direction in (("feature", vector), ("random", random))]
    rows = []
    with progress("sampling", len(arms) * len(config.prompts) * config.samples, "continuations") as bar:
        for name, direction, strength in arms:
            rows.append(measure_strength(lm, name, direction, strength, words, config))
            bar.advance(len(config.prompts) * config.samples)
    if config.out:
        settings = asdict(config)
        write_json(config.out, {"settings": settings, "feature": feature, "rows": [row._asdict() for row in rows]})
    print_strengths(rows, feature, vector.site, config)
    return rows


def measure_strength(
    lm: LanguageModel, name: str, vector: SteeringVector, strength: float, words: list[str], config: StrengthsConfig
) -> StrengthRow:
    """One line of the table: continuations of every prompt with strength · vector added everywhere, the same seeds in every line."""
    texts: list[str] = []
    losses: list[float] = []
    pairs: list[tuple[int, int]] = []
    failed = 0
    for number, prompt in enumerate(config.prompts):
        ids_sp, mask_sp = (t.expand(config.samples, -1) for t in lm.encode([prompt]))
        start = ids_sp.shape[1]
        try:
            with steered(lm, [(vector, strength)]):
                whole_sp = lm.generate(ids_sp, mask_sp, **vars(config.sampling) | {"seed": config.sampling.seed + number})
        except (NonFiniteLogits, OverflowError):
            failed += 1
            continue
        new_sn = whole_sp[:, start:]
        losses.append(continuation_loss(lm, ids_sp, new_sn))
        for row, real in zip(new_sn.tolist(), until_end(lm, new_sn).sum(1).tolist()):  # host sync
            texts.append(lm.tokenizer.decode(row[:real], skip_special_tokens=True))
            pairs += pairwise(row[:real])
    rate = word_rate(texts, words)
    of_texts = [word_rate([t], words) for t in texts]
    interval = ratio_interval(np.array([r.found for r in of_texts]), np.array([r.words for r in of_texts]), config.sampling.seed)
    distinct = len(set(pairs)) / len(pairs) if pairs else float("nan")
    nats = float(np.mean(losses)) if losses else float("nan")
    return StrengthRow(name, strength, rate.found, rate.words, interval, nats, distinct, failed, texts)


def print_strengths(rows: list[StrengthRow], feature: int, site: str, config: StrengthsConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"feature {feature} at {site}: {len(config.prompts)} prompts, {config.samples} continuations each, words of {config.words.name}"
    table = Table("added", "strength", "found", "per 1,000 words (95 %)", "nats/token", "distinct-2", title=title)
    for row in rows:
        low, high = (f"{1000 * x:.1f}" for x in row.interval)
        per_thousand = f"{1000 * row.found / max(1, row.words):.1f} ({low} to {high})"
        count = f"{row.found} of {row.words:,}"
        table.add_row(
            row.direction,
            f"{row.strength:g}" * bool(row.strength),
            count,
            per_thousand,
            f"{row.nats_per_token:.2f}",
            f"{row.distinct_2:.2f}",
        )
    failed = [f"{row.direction} x {row.strength:g} on {row.failed_prompts}" for row in rows if row.failed_prompts]
    if failed:
        table.caption = f"no text, because the logits were not finite: {', '.join(failed)} of {len(config.prompts)} prompts"
    Console().print(table)
