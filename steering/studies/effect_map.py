"""The command that measures what else steering with a feature changes, and finds a direction that changes this feature alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sae.activations.text.documents import TextConfig
from sae.disk.places import require_file
from sae.disk.writing import jsonable, write_json
from sae.errors import InputError
from sae.features.index.lens import folded_unembedding, into_residual, logit_lens
from sae.model.language_model import LanguageModel
from sae.model.sampling import Sampling
from sae.progress import progress
from sae.statistics import Estimate
from sae.text_input import text_list
from steering.dictionary import load_dictionary
from steering.directions.targeted import Effects, targeted_direction
from steering.strength.neutral import FEW_PROMPTS
from steering.strength.sequences import KLCalibrator, read_sequences, site_activations
from steering.studies.effects import (
    NEW_TOKENS,
    SAMPLES,
    AimScore,
    Effect,
    Rollouts,
    aim_difference,
    effect,
    feature_rows,
    measure_effects,
)
from steering.studies.principal import alive_features
from steering.vector import SteeringVector

ALIVE_DOCUMENTS = 1000  # on which features are looked for that fire


@dataclass(kw_only=True)
class EffectConfig(TextConfig):
    model: str
    """Model by hub name, folder or GGUF file."""
    dictionary: str
    """Folder, file or hub name of a dictionary of that model."""
    feature: tuple[int, ...] = ()
    """Features to steer with, by their decoder rows."""
    vector: Path | None = None
    """A saved steering vector to map instead of features; it has no targeted direction."""
    kl: float = 0.3
    """KL that steering causes on the text, in nats per token; the coefficient follows from it."""
    effects: Path | None = None
    """File of fitted effects. If given, every feature is steered with its targeted direction too."""
    fit: int = 0
    """Number of random features to measure first; the effects fitted to them are written to --effects. 0 reads that file."""
    bias_weight: float = 1.0
    """How strongly a targeted direction avoids what any steering does."""
    prompts: tuple[str, ...] = FEW_PROMPTS
    """Texts to continue."""
    samples: int = SAMPLES
    """Continuations of each prompt and direction."""
    new_tokens: int = NEW_TOKENS
    """Tokens per continuation."""
    calibration_documents: int = 16
    """Documents on which the coefficients are set."""
    length: int = 32
    """Tokens read of each document; shorter documents are left out."""
    top: int = 8
    """Number of features shown at each end of a map."""
    out: Path | None = None
    """JSON file for every number."""
    seed: int = 0
    """Seed of the choice of documents and features, and of the sampling."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""


class MappedDirection(NamedTuple):
    """One direction that was measured."""

    name: str
    feature: int | None
    """the feature it should change"""
    effect: Effect
    reached: bool


def effect_map(config: EffectConfig) -> dict[str, Any]:
    """Prints a map for every direction and, with effects, how well rows and targeted directions aim; returns all as plain values.

    Raises `InputError` when the parts do not belong together.
    """
    check(config)
    for path in (config.out, config.effects if config.fit else None):
        if path is not None:
            require_file(path)
    lm = LanguageModel.load(config.model, device=config.device)
    dictionary, site = load_dictionary(config.dictionary, lm)
    written_fd = into_residual(lm, site, dictionary.W_dec_fo)
    rows = feature_rows(dictionary, config.feature)
    documents = read_sequences(
        lm, config, config.calibration_documents + (ALIVE_DOCUMENTS if config.fit else 0), config.length, config.seed
    )
    calibrator = KLCalibrator(lm, documents.part(0, config.calibration_documents), site)
    effects = None
    if config.fit:
        alive, _ = alive_features(dictionary, site_activations(lm, documents, site).flatten(0, 1))
        if len(alive) < config.fit:
            raise InputError(f"expected {config.fit} features that fire on the text, found {len(alive)}; lower --fit")
        chosen = np.random.default_rng(config.seed).choice(alive, config.fit, replace=False).tolist()
        sampling = Sampling(max_new_tokens=config.new_tokens, seed=config.seed + 10_000)
        effects = measure_effects(Rollouts(lm, dictionary, config.prompts, 1, sampling), chosen, calibrator, config.kl)
        effects.save(config.effects)  # type: ignore[arg-type]
    elif config.effects:
        effects = Effects.load(config.effects)
    if effects and (effects.site != site or tuple(effects.M_df.shape) != (dictionary.d_in, dictionary.d_sae)):
        raise InputError(f"expected effects of a dictionary like {config.dictionary}, got others in {config.effects}; fit them with --fit")
    directions: list[tuple[str, int | None, SteeringVector]] = [(f"feature {j}", j, row) for j, row in zip(config.feature, rows)]
    if effects:
        directions += [(f"targeted {j}", j, targeted_direction(effects, j, config.bias_weight)) for j in config.feature]
    if config.vector:
        directions.append((str(config.vector), None, SteeringVector.load(config.vector).unit()))
    sampling = Sampling(max_new_tokens=config.new_tokens, seed=config.seed)
    rollouts = Rollouts(lm, dictionary, config.prompts, config.samples, sampling)
    mapped = measure_all(rollouts, directions, calibrator, config.kl)
    settings = jsonable(asdict(config))
    fitted = effects and {k: v for k, v in effects.provenance.items() if k not in ("features", "prompts")}
    result = {"format": "effect-map-1", "settings": settings, "fitted": fitted, "maps": [], "aims": aims(mapped)}
    result["maps"] = [strongest_effects(lm, written_fd, m, config.top) for m in mapped]
    if config.out:
        write_json(config.out, result)
    print_effects(result)
    return result


def check(config: EffectConfig) -> None:
    """Raises `InputError` for options that make no sense."""
    if not config.feature and not config.vector and not config.fit:
        raise InputError("expected --feature, --vector or --fit, got none; say what to steer with")
    if config.fit and not config.effects:
        raise InputError("expected --effects, the file to write, with --fit, got none")
    if config.fit and config.fit < 3:
        raise InputError(f"expected --fit of at least 3 directions, got {config.fit}")
    if config.samples * len(text_list(config.prompts, "prompts")) < 2 or config.calibration_documents < 1 or config.top < 1:
        raise InputError("expected at least 2 rollouts, one calibration document and one feature to show")


def measure_all(
    rollouts: Rollouts, directions: list[tuple[str, int | None, SteeringVector]], calibrator: KLCalibrator, kl: float
) -> list[MappedDirection]:
    """The effect of every unit direction at the budget, against the same unsteered rollouts."""
    mapped: list[MappedDirection] = []
    if not directions:
        return mapped
    unsteered_rf = rollouts.activations([])
    with progress("mapping", len(directions), "directions") as bar:
        for name, feature, unit in directions:
            found = calibrator.coefficient(unit, kl)
            mapped.append(MappedDirection(name, feature, effect(rollouts, unit, found.coefficient, unsteered_rf), found.reached))
            bar.advance(1)
    return mapped


def aims(mapped: list[MappedDirection]) -> list[dict[str, Any]]:
    """For each feature how well its row aims, its targeted direction, and the second minus the first."""
    rows, found = {m.feature: m for m in mapped if m.name.startswith("feature")}, []
    for m in mapped:
        if m.feature is None or not m.name.startswith("targeted"):
            continue
        row = rows[m.feature]
        aimed = {"row": AimScore.of(row.effect, m.feature), "targeted": AimScore.of(m.effect, m.feature)}
        aimed["difference"] = aim_difference(m.effect, row.effect, m.feature)
        found.append({"feature": m.feature} | {k: v._asdict() for k, v in aimed.items()})
    return found


def strongest_effects(lm: LanguageModel, written_fd: torch.Tensor, mapped: MappedDirection, top: int) -> dict[str, Any]:
    """The features that rise and fall most, each with its interval and what its own row makes the model say."""
    y_f, low_f, high_f = mapped.effect.map()
    surely = int(((low_f > 0) | (high_f < 0)).sum())
    unembedding_vd, _ = folded_unembedding(lm)

    def listed(order: torch.Tensor) -> list[dict[str, Any]]:
        tokens = logit_lens(written_fd[order.to(written_fd.device)], unembedding_vd, 5)["top_token_ids"]
        return [
            {
                "feature": j,
                "effect": {"value": float(y_f[j]), "low": float(low_f[j]), "high": float(high_f[j])},
                "tokens": ids if lm.tokenizer is None else [lm.tokenizer.decode([i]) for i in ids],
            }
            for j, ids in zip(order.tolist(), tokens.tolist())
        ]

    known = {"name": mapped.name, "feature": mapped.feature, "coefficient": mapped.effect.coefficient, "reached": mapped.reached}
    ends = {"raised": listed(y_f.topk(top).indices), "lowered": listed(y_f.topk(top, largest=False).indices)}
    by_chance = 0.05 * int(mapped.effect.difference_rf.any(0).sum())
    own = mapped.feature is not None and {"own_rank": int((y_f > y_f[mapped.feature]).sum()) + 1}
    return known | {"moved": surely, "moved_by_chance": by_chance} | (own or {}) | ends


def print_effects(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def cell(value: Estimate, form: str = ".2f") -> str:
        own, low, high = ("-" if value[key] is None else f"{value[key]:{form}}" for key in ("value", "low", "high"))
        return f"{own} ({low} to {high})"

    for found in result["maps"]:
        off = "" if found["reached"] else ", which does not reach the budget"
        title = f"{found['name']} x {found['coefficient']:.3g}{off}: {found['moved']} features have an interval without 0 "
        title += f"({found['moved_by_chance']:.0f} by chance)"
        table = Table("", "feature", "effect", "its row raises", title=title)
        for end in ("raised", "lowered"):
            for row in found[end]:
                table.add_row(end, str(row["feature"]), cell(row["effect"]), " ".join(map(repr, row["tokens"])))
        console.print(table)
    if result["aims"]:
        table = Table(
            "feature", "direction", "moves it by", "all others", "it / others", title="decoder rows and targeted directions, at equal KL"
        )
        for found in result["aims"]:
            for name, form in (("row", ".2f"), ("targeted", ".2f"), ("difference", "+.2f")):
                numbers = [cell(found[name][key], form) for key in ("feature", "others", "share")]
                table.add_row(str(found["feature"]), name, *numbers)
        console.print(table)
    if result["fitted"]:
        fitted = result["fitted"]
        console.print(
            f"effects of {fitted['directions']} directions; {fitted['left_out_explained']:.1%} of the variance of one left out is predicted"
        )
