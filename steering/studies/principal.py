"""Do principal directions mean anything? Components of the residual stream against random and learned directions, at equal KL.

s sequences (prompts) · p positions · d width of the site · v vocabulary · k directions · n documents · r rounds of the bootstrap

A direction is measured on both sides, +c and −c, each at the coefficient at which the model's predictions change by the same KL. What a
side changes in the centred logits at each prompt and position is what its numbers are made of; the direction's number is the mean of
its sides.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.activations.text.documents import TextConfig
from sae.dictionaries.dictionary import Dictionary
from sae.disk.places import require_folder
from sae.disk.writing import jsonable, write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import progress
from sae.statistics import auroc
from steering.dictionary import load_dictionary
from steering.directions.pca import principal_directions
from steering.directions.random import random_direction, random_in_span
from steering.strength.calibration import SteeredTexts, divergence
from steering.strength.sequences import KLCalibrator, Sequences, read_sequences, site_activations
from steering.studies.measured import COMPONENT, IN_SPAN, IN_SPAN_WEIGHTED, RANDOM, TOP, Direction, DirectionResult, OneSign
from steering.vector import SteeringVector

DENSE = 1 << 28  # activations of all features at a time: 1 GiB
FEATURE, FEATURE_OF_LABEL, DIFFMEAN = "feature", "feature of a label", "difference of means"


@dataclass(kw_only=True)
class PrincipalConfig(TextConfig):
    model: str
    """Model by hub name, folder or GGUF file."""
    site: str
    """Site, for example resid_post.2."""
    out: Path
    """Folder for principal.json."""
    dictionary: str | None = None
    """Folder, file or hub name of a dictionary at that site. Default: the arms of its features are left out."""
    components: int = 32
    """Number of principal components."""
    random: int = 64
    """Random directions in the span of the components (uniform); half as many of every other random group and of features."""
    kl: float = 0.3
    """KL at which every direction is measured, in nats per token."""
    fit_documents: int = 2000
    """Documents for components and differences of means, and for choosing labels."""
    held_documents: int = 1000
    """Further documents on which labels are recovered."""
    calibration_documents: int = 16
    """Further documents on which the coefficients are set."""
    prompts: int = 32
    """Further documents on which the change of the logits is measured."""
    length: int = 32
    """Tokens read of each document; shorter documents are left out."""
    seed: int = 0
    """Seed of the split of the documents, the random directions and the bootstrap."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""


def pair_cosines(change_spv: Tensor) -> np.ndarray:
    """Mean cosine between the changes of prompts s and t over all pairs of their positions, float64 [s, s].

    The sum of unit vectors holds it: mean over p, q of u_sp · u_tq = (mean_p u_sp) · (mean_q u_tq). A change of zero has cosine 0.
    """
    mean_sv = torch.nn.functional.normalize(change_spv.float(), dim=-1).mean(1).double()
    return (mean_sv @ mean_sv.T).cpu().numpy()  # host sync


def effective_tokens(mean_change_v: Tensor, top: int = TOP) -> float:
    """exp(entropy) of the softmax over the `top` most raised tokens: `top` if all are raised alike, 1 if one stands out."""
    log_p = mean_change_v.double().topk(min(top, len(mean_change_v))).values.log_softmax(0)
    return float((-(log_p.exp() * log_p).sum()).exp())  # host sync


def linearity(plus_spv: Tensor, minus_spv: Tensor) -> np.ndarray:
    """−cos(change at +c, change at −c), mean over a prompt's positions, [s]: 1 where the two sides are opposite."""
    return -torch.nn.functional.cosine_similarity(plus_spv.double(), minus_spv.double(), dim=-1).mean(1).cpu().numpy()  # host sync


def label_aurocs(score_nk: np.ndarray, label_n: np.ndarray, labels: int) -> np.ndarray:
    """AUROC of each column for each label against all others, [k, labels]; NaN for a label that all or none have."""
    return np.stack([auroc(score_nk[label_n == j], score_nk[label_n != j]) for j in range(labels)], axis=1)


def recovered_labels(fit_nk: np.ndarray, fit_label_n: np.ndarray, held_nk: np.ndarray, held_label_n: np.ndarray, labels: int) -> list:
    """For each column the label and sign of highest AUROC on the fit documents, and the AUROC of those on the held ones."""
    fit_kl, held_kl = label_aurocs(fit_nk, fit_label_n, labels), label_aurocs(held_nk, held_label_n, labels)
    best_k = np.nanargmax(np.abs(fit_kl - 0.5), axis=1)
    return [(int(j), float(held[j] if fit[j] >= 0.5 else 1 - held[j])) for j, fit, held in zip(best_k, fit_kl, held_kl)]


class Prompts:
    """The sequences on which directions are measured."""

    def __init__(self, lm: LanguageModel, sequences: Sequences):
        self.texts, self._first = SteeredTexts(lm, sequences.ids_sp, torch.ones_like(sequences.ids_sp)), sequences.first

    def predictions(self, every_nv: Tensor) -> Tensor:
        """The log-probabilities at the columns that count, [s, p, v]."""
        return every_nv.unflatten(0, self.texts.ids_sp.shape)[:, self._first :]

    @property
    def unsteered_spv(self) -> Tensor:
        return self.predictions(self.texts.unsteered_nv)


@torch.no_grad()
def measure_direction(unit: SteeringVector, prompts: Prompts, calibrator: KLCalibrator, kl: float) -> DirectionResult:
    """Both sides of a unit direction at `kl` nats per token. Raises `InputError` if no coefficient gives finite predictions."""
    sides, changes = [], []
    unsteered_spv = prompts.unsteered_spv
    for sign in (1, -1):
        found = calibrator.coefficient(unit, kl, sign)
        steered_spv = prompts.predictions(prompts.texts.log_probs([(unit, sign * found.coefficient)]))
        change_spv = steered_spv - unsteered_spv
        change_spv -= change_spv.mean(-1, keepdim=True)  # a constant over the vocabulary does nothing
        if not torch.isfinite(change_spv).all():  # host sync
            raise InputError(f"expected finite predictions along {unit.provenance}, got none; the model's arithmetic cannot carry it")
        mean_v = change_spv.mean((0, 1))
        v = change_spv.shape[-1]
        kl_here = divergence(unsteered_spv.reshape(-1, v), steered_spv.reshape(-1, v)).kl
        top = mean_v.topk(min(TOP, v)).indices.tolist()  # host sync
        rho = found.coefficient / calibrator.typical_norm
        sides.append(OneSign(found.coefficient, rho, found.reached, kl_here, pair_cosines(change_spv), effective_tokens(mean_v), top))
        changes.append(change_spv)
    return DirectionResult(sides[0], sides[1], linearity(*changes))


def principal_study(config: PrincipalConfig) -> dict[str, Any]:
    """Measures all groups of directions, prints the tables and writes `principal.json`; returns what is in that file.

    Raises `InputError` for text, model and dictionary that do not belong together.
    """
    from steering.studies.principal_report import print_principal, report

    if min(config.components, config.prompts, config.fit_documents, config.held_documents) < 2 or config.random < 4:
        raise InputError("expected at least 2 components, 4 random directions, and 2 prompts, fitting and held-out documents")
    require_folder(config.out)
    lm = LanguageModel.load(config.model, device=config.device)
    dictionary = None if config.dictionary is None else load_dictionary(config.dictionary, lm, config.site)[0]
    counts = (config.fit_documents, config.held_documents, config.calibration_documents, config.prompts)
    every = read_sequences(lm, config, sum(counts), config.length, config.seed)
    fit, held, calibration, prompts = (every.part(sum(counts[:i]), n) for i, n in enumerate(counts))
    fit_npd, held_npd = site_activations(lm, fit, config.site), site_activations(lm, held, config.site)
    directions, left_out = all_directions(config, fit, fit_npd, dictionary)
    calibrator, measured_on = KLCalibrator(lm, calibration, config.site), Prompts(lm, prompts)
    measured = []
    with progress("measuring", len(directions), "directions") as bar:
        for direction in directions:
            measured.append(measure_direction(direction.unit, measured_on, calibrator, config.kl))
            bar.advance(1, group=direction.group)
    recovered = None
    if every.labels:
        units_dk = torch.stack([direction.unit.direction_d for direction in directions], dim=1)
        fit_nk, held_nk = ((x_npd.mean(1) @ units_dk).numpy() for x_npd in (fit_npd, held_npd))
        found = recovered_labels(fit_nk, fit.label_s, held_nk, held.label_s, len(every.labels))
        recovered = [(every.labels[label], auroc) for label, auroc in found]
    known = {"name": lm.name, "fingerprint": lm.fingerprint()}
    settings = jsonable(asdict(config))
    result = {"format": "principal-1", "model": known, "settings": settings, "left_out": left_out}
    result |= report(lm.tokenizer, directions, measured, recovered, config.seed)
    write_json(config.out / "principal.json", result)
    print_principal(result)
    return result


def all_directions(
    config: PrincipalConfig, fit: Sequences, fit_npd: Tensor, dictionary: Dictionary | None
) -> tuple[list[Direction], list[str]]:
    """Every group's unit directions, and a sentence for each group that is not possible."""
    site, half, few = config.site, config.random // 2, []
    acts_nd = fit_npd.flatten(0, 1)
    components = principal_directions(acts_nd, site, config.components, seed=config.seed)
    found = [
        Direction(COMPONENT, f"component {i} ({vector.provenance['explained_share']:.1%} of the variance)", vector.unit())
        for i, vector in enumerate(components, 1)
    ]
    units_kd, scaled_kd = (torch.stack([v.direction_d for v in vs]) for vs in ([v.unit() for v in components], components))
    seeds = np.random.SeedSequence(config.seed).generate_state(config.random + 2 * half).tolist()
    found += [Direction(IN_SPAN, f"seed {i}", random_in_span(units_kd, site, i)) for i in seeds[: config.random]]
    found += [Direction(IN_SPAN_WEIGHTED, f"seed {i}", random_in_span(scaled_kd, site, i)) for i in seeds[config.random : -half]]
    found += [Direction(RANDOM, f"seed {i}", random_direction(acts_nd.shape[1], site, i)) for i in seeds[-half:]]
    if not fit.labels:
        few.append("the text has no labels: differences of means, features by label and the recovery of labels are left out")
    if dictionary is None:
        few.append("no dictionary was given: its features are left out")
    else:
        found += feature_directions(dictionary, site, fit, fit_npd, half, config.seed)
    for j, label in enumerate(fit.labels):
        is_n = torch.from_numpy(fit.label_s == j)
        if 0 < is_n.sum() < len(is_n):
            difference_d = fit_npd[is_n].mean((0, 1)) - fit_npd[~is_n].mean((0, 1))
            vector = SteeringVector.at(site, difference_d, {"method": "diffmean", "label": label})
            found.append(Direction(DIFFMEAN, f"{label} against the others", vector.unit()))
    return found, few


def alive_features(dictionary: Dictionary, acts_nd: Tensor, least: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the features that fire on at least `least` rows, and every feature's highest activation, [f]."""
    firing_f = torch.zeros(dictionary.d_sae, dtype=torch.long)
    highest_f = torch.zeros(dictionary.d_sae)
    for rows_bd in acts_nd.split(max(1, min(4096, DENSE // dictionary.d_sae))):
        acts_bf = dictionary.encode(rows_bd.to(dictionary.W_enc_fd.device)).cpu()  # host sync
        firing_f += (acts_bf > 0).sum(0)
        highest_f = torch.maximum(highest_f, acts_bf.max(0).values.float())
    return np.flatnonzero(firing_f >= least), highest_f.numpy()


def feature_directions(dictionary: Dictionary, site: str, fit: Sequences, fit_npd: Tensor, count: int, seed: int) -> list[Direction]:
    """Decoder rows: of `count` random features that fire, and for each label the one along which documents show it best."""
    alive, _ = alive_features(dictionary, fit_npd.flatten(0, 1)[:50_000])
    if len(alive) < count:
        raise InputError(f"expected at least {count} features that fire on the text, found {len(alive)}; lower --random")
    rows_kd = dictionary.rows(torch.from_numpy(alive)).float().cpu()  # host sync

    def direction(group: str, name: str, j: int) -> Direction:
        row_d = rows_kd[int(np.searchsorted(alive, j))]
        return Direction(group, name, SteeringVector.at(site, row_d, {"method": "feature", "feature": int(j)}).unit())

    chosen = np.random.default_rng(seed).choice(alive, count, replace=False)
    found = [direction(FEATURE, f"feature {j}", j) for j in chosen]
    if fit.labels:
        best = np.nan_to_num(label_aurocs((fit_npd.mean(1) @ rows_kd.T).numpy(), fit.label_s, len(fit.labels)))
        winners = {int(alive[column]): fit.labels[label] for label, column in enumerate(best.argmax(0))}  # one may win several labels
        found += [direction(FEATURE_OF_LABEL, f"feature {j} ({label})", j) for j, label in winners.items()]
    return found
