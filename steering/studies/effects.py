"""The effect of steering along a direction on every feature of a dictionary, in the text that the model then writes.

r rollouts (texts) · p positions with the prompt · n new tokens · d width of the site · f features · k directions

The effect is y_f = E[a_f of steered text] − E[a_f of unsteered text], both read by the unsteered model, so that it is the text that
counts and not the vector itself (SAE-TS: Chalnev, Siu and Conmy 2024, arXiv 2411.02193).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sampling import Sampling
from sae.progress import progress
from sae.statistics import ENDS, Estimate, data_and_resamples, estimate
from sae.text_input import text_list
from steering.directions.targeted import Effects, fit_effects
from steering.intervention import Item, Strength, steered
from steering.strength.measure import until_end
from steering.strength.neutral import FEW_PROMPTS
from steering.strength.sequences import KLCalibrator
from steering.studies.measured import consistency
from steering.vector import SteeringVector

SAMPLES = 32
NEW_TOKENS = 24
ROWS = 128  # rollouts in one batch
DENSE = 1 << 28  # activations of all features at a time: 1 GiB


class Effect(NamedTuple):
    """Effect of one direction at one coefficient."""

    coefficient: float
    difference_rf: Tensor
    """mean activation over a steered rollout's new tokens minus that over the unsteered rollout of the same prompt and seed"""
    weight_tr: np.ndarray
    """rounds of the bootstrap over rollouts, the first of them the data; the same for all effects of as many rollouts"""

    def map(self) -> tuple[Tensor, Tensor, Tensor]:
        """y and the ends of its 95 % interval, each [f]."""
        drawn_tr = torch.from_numpy(self.weight_tr / self.weight_tr.sum(1, keepdims=True)).float()
        found = [torch.quantile(drawn_tr[1:] @ part_rf, torch.tensor(ENDS), dim=0) for part_rf in self.difference_rf.split(512, 1)]
        low_f, high_f = torch.cat(found, dim=1)
        return self.difference_rf.mean(0), low_f, high_f

    def on(self, feature: int) -> np.ndarray:
        """y of one feature in every round."""
        return self.weight_tr @ self.difference_rf[:, feature].double().numpy() / self.weight_tr.sum(1)

    def others(self, feature: int) -> np.ndarray:
        """√Σ y² over all other features in every round.

        From products of different rollouts, whose noise is independent: the square of a mean would count its noise as effect.
        """
        rest_rf = self.difference_rf.double().clone()
        rest_rf[:, feature] = 0
        squared_t = consistency((rest_rf @ rest_rf.T).numpy(), self.weight_tr)
        return np.sqrt(np.maximum(squared_t, 0))


@dataclass(frozen=True)
class Rollouts:
    """Texts that the model writes and whose activations are read: the same prompts and seeds for every direction."""

    lm: LanguageModel
    dictionary: Dictionary
    prompts: Sequence[str] = FEW_PROMPTS
    samples: int = SAMPLES
    """texts of each prompt"""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=NEW_TOKENS))

    @torch.no_grad()
    def activations(self, vectors: Sequence[tuple[Item, Strength]]) -> Tensor:
        """Mean activation of every feature over each rollout's new tokens, [r, f] on the CPU; rollouts of one prompt stand together.

        The vectors act while the text is written, not while it is read.
        """
        prompts = text_list(self.prompts, "prompts")
        if self.samples < 1 or not prompts:
            raise InputError(f"expected at least one prompt and one sample of each, got {len(prompts)} and {self.samples}")
        ids_sp, mask_sp = (x.repeat_interleave(self.samples, dim=0) for x in self.lm.encode(prompts))
        start, parts = ids_sp.shape[1], []
        for number, (ids, mask) in enumerate(zip(ids_sp.split(ROWS), mask_sp.split(ROWS))):
            with steered(self.lm, vectors):
                whole_rp = self.lm.generate(ids, mask, **vars(self.sampling) | {"seed": self.sampling.seed + number})
            parts.append(read_rollouts(self.lm, self.dictionary, whole_rp, mask, start))
        return torch.cat(parts)


def effect(rollouts: Rollouts, vector: SteeringVector, coefficient: float, unsteered_rf: Tensor | None = None) -> Effect:
    """Adds `coefficient * vector` everywhere while the texts are written, and compares them with unsteered ones.

    `unsteered_rf` is `rollouts.activations([])`, for those who measure several directions. Raises `NonFiniteLogits` where the model
    cannot speak any more.
    """
    if unsteered_rf is None:
        unsteered_rf = rollouts.activations([])
    steered_rf = rollouts.activations([(vector, coefficient)])
    weight_tr = data_and_resamples(len(steered_rf), np.random.default_rng(rollouts.sampling.seed), rounds=1000)
    return Effect(coefficient, steered_rf - unsteered_rf, weight_tr)


def read_rollouts(lm: LanguageModel, dictionary: Dictionary, whole_rp: Tensor, mask_rp: Tensor, start: int) -> Tensor:
    """Mean activations of the new tokens, from column `start` to each row's end of text, as the unsteered model sees them; [r, f]."""
    site = dictionary.require_site()
    real_rn = until_end(lm, whole_rp[:, start:])
    whole_mask_rp = torch.cat([mask_rp, real_rn.to(mask_rp)], dim=1)
    h_rnd = lm.record(whole_rp, [site], whole_mask_rp)[site][:, start:]
    means = []
    few = max(1, min(16, DENSE // (dictionary.d_sae * h_rnd.shape[1])))  # rows, since every token has all features
    for h_nd, real_n in zip(h_rnd.split(few), real_rn.split(few)):
        weight_n1 = real_n[..., None].to(h_nd)
        means.append(((dictionary.encode(h_nd) * weight_n1).sum(1) / weight_n1.sum(1)).float().cpu())  # host sync
    return torch.cat(means)


def feature_rows(dictionary: Dictionary, features: Sequence[int]) -> list[SteeringVector]:
    """Unit decoder rows. Raises `InputError` for a feature that does not exist."""
    for j in features:
        if not 0 <= j < dictionary.d_sae:
            raise InputError(f"feature {j} does not exist: the dictionary has features 0 to {dictionary.d_sae - 1}")
    rows_kd = dictionary.rows(list(features)).float().cpu()  # host sync
    site = dictionary.require_site()
    return [SteeringVector.at(site, row_d, {"method": "feature", "feature": int(j)}).unit() for j, row_d in zip(features, rows_kd)]


def measure_effects(rollouts: Rollouts, features: Sequence[int], calibrator: KLCalibrator, kl: float) -> Effects:
    """`fit_effects` of the decoder rows of `features`, each added at `kl` nats per token.

    One rollout of each prompt suffices, since many directions are fitted together. Several share a batch, each acting on its own rows.
    """
    dictionary, samples, seed = rollouts.dictionary, rollouts.samples, rollouts.sampling.seed
    base_f = replace(rollouts, samples=SAMPLES).activations([]).mean(0)
    units = feature_rows(dictionary, features)
    together = max(1, ROWS // (len(rollouts.prompts) * samples))
    x, y = [], []
    with progress("measuring effects", len(units), "directions") as bar:
        for first in range(0, len(units), together):
            batch = units[first : first + together]
            coefficients = [calibrator.coefficient(unit, kl).coefficient for unit in batch]
            # a prompt's rollouts stand together: samples of the first direction, then of the second ...
            owner_r = torch.arange(len(batch)).repeat_interleave(samples).repeat(len(rollouts.prompts))
            terms: list[tuple[Item, Strength]] = [(u, c * (owner_r == i).float()) for i, (u, c) in enumerate(zip(batch, coefficients))]
            terms = [(batch[0], coefficients[0])] if len(batch) == 1 else terms  # which may then take several passes
            sampling = replace(rollouts.sampling, seed=seed + 1 + first)
            acts_rf = replace(rollouts, samples=samples * len(batch), sampling=sampling).activations(terms)
            x += [c * unit.direction_d for unit, c in zip(batch, coefficients)]
            y += [acts_rf[owner_r == i].mean(0) - base_f for i in range(len(batch))]
            bar.advance(len(batch))
    provenance = {"model": rollouts.lm.name, "kl": kl, "features": [int(j) for j in features], "prompts": list(rollouts.prompts)}
    provenance |= {"seed": seed, "samples": samples, "new_tokens": rollouts.sampling.max_new_tokens}
    return fit_effects(torch.stack(x), torch.stack(y), dictionary.require_site(), provenance)


class AimScore(NamedTuple):
    """How well a direction moves its feature alone, with 95 % intervals over rollouts."""

    feature: Estimate
    others: Estimate
    share: Estimate
    """feature / others"""

    @classmethod
    def of(cls, found: Effect, feature: int) -> "AimScore":
        on_t, others_t = found.on(feature), found.others(feature)
        with np.errstate(invalid="ignore", divide="ignore"):
            return cls(estimate(on_t), estimate(others_t), estimate(on_t / others_t))


def aim_difference(one: Effect, other: Effect, feature: int) -> AimScore:
    """`AimScore` of one direction minus that of another, rollouts of the same prompt and seed drawn again together."""
    on_t, others_t = ([e.on(feature) for e in (one, other)], [e.others(feature) for e in (one, other)])
    with np.errstate(invalid="ignore", divide="ignore"):
        share_t = [a / b for a, b in zip(on_t, others_t)]
        return AimScore(*(estimate(a - b) for a, b in (on_t, others_t, share_t)))
