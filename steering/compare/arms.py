"""The arms of a comparison: every method to steer towards one concept, made from the same texts, each as a unit vector.

n tokens of a text · t texts · d width of the site · f features
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.statistics import auroc
from steering.compare.concepts import LabelledTexts, Texts
from steering.concept import Concept
from steering.directions.actadd import actadd, site_before_block
from steering.directions.diffmean import diffmean
from steering.directions.feature import by_output_score, feature_direction
from steering.directions.iti import fit_iti
from steering.directions.pca import FIRST_DROPPED, pca_of_differences, principal_directions_of_texts
from steering.directions.random import random_direction, shuffled_labels
from steering.directions.targeted import Effects, targeted_direction
from steering.directions.texts import activations_of_texts
from steering.strength.calibration import TOKENS
from steering.vector import SteeringVector

CANDIDATES = 32  # features, of highest AUROC, among which the output score chooses; and principal components that are looked at
PLAIN_TEXTS = 256  # documents of the plain batch
HEADS = 48 / 1024  # share of all heads that inference-time intervention was published with
NONE, PROMPTING, RANDOM, SHUFFLED = "no steering", "plain prompting", "random direction", "shuffled labels"
Kind = Literal["method", "control", "baseline"]
Method = Literal[
    "sae-feature-named",
    "sae-feature-by-auroc",
    "sae-feature-by-output-score",
    "sae-ts",
    "actadd",
    "diffmean",
    "pca-of-differences",
    "principal-direction",
    "iti",
]
"""the methods of `MAKERS`, as on the command line"""


class Arm(NamedTuple):
    method: str
    kind: Kind
    vector: SteeringVector | None = None
    """of norm 1; None for the baselines and for arms that are left out"""
    strongest: float | None = None
    """length of the direction's highest natural occurrence, if a better value than the largest projection on neutral text is known"""
    prefix: str = ""
    """text before every prompt"""
    note: str | None = None
    left_out: str | None = None
    """the reason why this arm is left out"""


@dataclass(frozen=True)
class ArmInputs:
    """The inputs of the methods. No direction is made from the held-out texts or the classifier's texts."""

    lm: LanguageModel
    site: str
    concept: Concept
    texts: Texts
    prompts: Sequence[str]
    max_new_tokens: int
    """number of new tokens after the prompts"""
    dictionary: Dictionary | None = None
    corpus: LabelledTexts | None = None
    effects: Effects | None = None
    """of the dictionary's rows, fitted before the comparison"""
    feature: int | None = None
    """of the dictionary, chosen by the user"""
    seed: int = 0

    @cached_property
    def fit(self) -> tuple[list[Tensor], list[Tensor]]:
        """Activations at the site of each training text, positive and negative, [n, d] each."""
        if not (self.texts.fit_positive and self.texts.fit_negative):
            raise InputError(f"the concept {self.concept.name} has no contrast texts")
        return tuple(activations_of_texts(self.lm, side, self.site) for side in (self.texts.fit_positive, self.texts.fit_negative))  # type: ignore[return-value]

    @cached_property
    def fit_means(self) -> tuple[Tensor, Tensor]:
        """Mean activation of each text, [t, d], so that a long text counts as much as a short one."""
        return tuple(torch.stack([x_nd.mean(0) for x_nd in side]) for side in self.fit)  # type: ignore[return-value]

    @cached_property
    def features(self) -> tuple[np.ndarray, Tensor, Tensor]:
        """AUROC of every feature's mean activation of a text, [f], and its highest and lowest activation on the texts, [f] each."""
        if self.dictionary is None:
            raise InputError("no dictionary was given")
        means, highest_f, lowest_f = [], torch.zeros(self.dictionary.d_sae), torch.zeros(self.dictionary.d_sae)
        for x_nd in (*self.fit[0], *self.fit[1]):
            with torch.no_grad():
                acts_nf = self.dictionary.encode(x_nd.to(self.dictionary.W_enc_fd.device)).float().cpu()  # host sync
            means.append(acts_nf.mean(0))
            highest_f = torch.maximum(highest_f, acts_nf.amax(0))
            lowest_f = torch.minimum(lowest_f, acts_nf.amin(0))  # below 0 for AbsTopK
        mean_tf = torch.stack(means).numpy()
        return auroc(mean_tf[: len(self.fit[0])], mean_tf[len(self.fit[0]) :]), highest_f, lowest_f

    @cached_property
    def output_feature(self) -> SteeringVector:
        """Among the `CANDIDATES` best by AUROC, the feature with the highest output score."""
        candidates = _best_features(self)
        highest = [float(self.features[1][j]) for j in candidates]
        return by_output_score(self.lm, self.dictionary, candidates, highest, self.site)  # type: ignore[arg-type]


def build_arms(material: ArmInputs, methods: Sequence[Method] = ()) -> list[Arm]:
    """Baselines, controls and the methods (all, by default); those whose inputs are missing say so in `left_out`.

    A method's warnings are in its note, and are printed again.
    """
    arms = [Arm(NONE, "baseline"), _prompting(material)]
    for method, (kind, make) in MAKERS.items():
        if methods and kind == "method" and method.lower().replace(" ", "-") not in methods:
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                vector, strongest, note = make(material)
                arm = Arm(method, kind, vector.unit(), strongest)
            except InputError as error:
                arm, note = Arm(method, kind, left_out=str(error)), None
        warned = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        for sentence in warned:
            warnings.warn(f"{method}: {sentence}", stacklevel=2)
        arms.append(arm._replace(note="; ".join([note, *warned] if note else warned) or None))
    return arms


def _prompting(m: ArmInputs) -> Arm:
    prefix = (m.concept.prompt or "").strip()
    if not prefix:
        return Arm(PROMPTING, "baseline", left_out=f"the concept {m.concept.name} has no prompt to put before")
    behind = max(m.max_new_tokens + m.lm.encode(m.prompts)[0].shape[1], TOKENS)
    if (length := m.lm.encode([prefix])[0].shape[1]) + behind > m.lm.context:
        return Arm(
            PROMPTING, "baseline", left_out=f"its prompt of {length} tokens leaves no room for {behind} more in {m.lm.context} positions"
        )
    return Arm(PROMPTING, "baseline", prefix=f"{prefix} ", note=f"before every prompt: {prefix}")


class NewArm(NamedTuple):
    vector: SteeringVector
    strongest: float | None = None
    """see `Arm`"""
    note: str | None = None


def _random(m: ArmInputs) -> NewArm:
    return NewArm(random_direction(m.lm.width(m.site), m.site, m.seed))


def _shuffled(m: ArmInputs) -> NewArm:
    return NewArm(shuffled_labels(*m.fit_means, m.site, m.seed))


def _best_features(m: ArmInputs) -> list[int]:
    auroc_f, highest_f, _ = m.features
    best = [int(j) for j in np.argsort(-auroc_f, kind="stable")[:CANDIDATES] if auroc_f[j] > 0.5 and highest_f[j] > 0]
    if not best:
        raise InputError("no feature fires more on the positive texts than on the negative ones")
    return best


def _feature_given(m: ArmInputs) -> NewArm:
    if m.feature is None:
        raise InputError("no feature was named")
    auroc_f, highest_f, lowest_f = m.features
    highest = float(max(highest_f[m.feature], lowest_f[m.feature], key=abs))
    vector = feature_direction(m.dictionary, m.feature, highest or 1.0, m.site)  # type: ignore[arg-type]
    made = _feature(m, vector, f"AUROC {auroc_f[m.feature]:.2f}")
    return made if highest else NewArm(vector, note=f"feature {m.feature}: it never fires on the texts to fit")


def _feature_auroc(m: ArmInputs) -> NewArm:
    j = _best_features(m)[0]
    auroc_f, highest_f, _ = m.features
    return _feature(m, feature_direction(m.dictionary, j, float(highest_f[j]), m.site), f"AUROC {auroc_f[j]:.2f}")  # type: ignore[arg-type]


def _feature_output(m: ArmInputs) -> NewArm:
    vector = m.output_feature
    j, scores = vector.provenance["feature"], vector.provenance["output_scores"]
    return _feature(m, vector, f"AUROC {m.features[0][j]:.2f}, output score {scores[str(j)]:.3f}, the highest of {len(scores)} by AUROC")


def _targeted(m: ArmInputs) -> NewArm:
    if m.effects is None:
        raise InputError("no fitted effects were given")
    feature = m.output_feature.provenance["feature"]
    d_sae = m.dictionary.d_sae  # type: ignore[union-attr]
    if (m.effects.site, m.effects.M_df.shape[1]) != (m.site, d_sae):
        theirs = f"{m.effects.site} and {m.effects.M_df.shape[1]}"
        raise InputError(f"expected effects at {m.site} on the dictionary's {d_sae} features, got them at {theirs}")
    return NewArm(targeted_direction(m.effects, feature), note=f"aimed at feature {feature}, the one by output score")


def _feature(m: ArmInputs, vector: SteeringVector, said: str) -> NewArm:
    """A feature's own length is that of its maximum activation on the fit texts."""
    return NewArm(vector, vector.norm, f"feature {vector.provenance['feature']}: {said} on the texts to fit")


def _actadd(m: ArmInputs) -> NewArm:
    if not m.concept.prompt_pairs:
        raise InputError(f"the concept {m.concept.name} has no pair of prompts")
    pair = m.concept.prompt_pairs[0]
    vector = actadd(m.lm, *pair, site_before_block(m.site, m.lm.n_layers))
    rows, columns = len(next(iter(vector.directions.values()))), m.lm.encode(m.prompts)[0].shape[1]
    if rows > columns:
        raise InputError(f"its prompts have {rows} tokens, more than the longest prompt to continue, {columns}")
    return NewArm(vector, note=f"{pair[0]!r} minus {pair[1]!r}, added once at the first {rows} tokens")


def _diffmean(m: ArmInputs) -> NewArm:
    return NewArm(diffmean(*m.fit_means, m.site))


def _pca(m: ArmInputs) -> NewArm:
    vector = pca_of_differences(*m.fit_means, m.site, seed=m.seed)
    return NewArm(vector, note=f"{vector.provenance['explained_share']:.0%} of the differences' squared length")


def _principal(m: ArmInputs) -> NewArm:
    """The component of a plain batch, with its sign, that separates the training texts best."""
    plain = [*m.texts.fit_positive, *m.texts.fit_negative]
    if m.corpus is not None:
        used = {text for part in m.texts[2:] for text in part}
        order = np.random.default_rng(m.seed).permutation(len(m.corpus.texts))
        plain = [m.corpus.texts[i] for i in order if m.corpus.texts[i] not in used][:PLAIN_TEXTS]
    pos_td, neg_td = m.fit_means
    plain = [text for text in plain if m.lm.encode([text])[1].sum() > FIRST_DROPPED + 1]  # host sync
    components = principal_directions_of_texts(m.lm, plain, m.site, min(CANDIDATES, m.lm.width(m.site)), seed=m.seed)
    unit_dk = torch.stack([v.unit().direction_d for v in components], dim=1)
    auroc_k = auroc((pos_td @ unit_dk).numpy(), (neg_td @ unit_dk).numpy())
    best = int(np.abs(auroc_k - 0.5).argmax())
    sign = 1 if auroc_k[best] >= 0.5 else -1
    reached = max(auroc_k[best], 1 - auroc_k[best])
    note = f"{'+-'[sign < 0]}component {best + 1} of {len(plain)} texts: AUROC {reached:.2f} on the texts to fit"
    return NewArm(sign * components[best], note=note)


def _iti(m: ArmInputs) -> NewArm:
    pos, neg = m.texts.fit_positive, m.texts.fit_negative
    counts = [len(side) for side in m.fit]
    groups = [i for count in counts for i in range(count)] if counts[0] == counts[1] else None
    heads = max(4, round(HEADS * m.lm.n_layers * m.lm.model.config.get_text_config().num_attention_heads))
    vector = fit_iti(m.lm, [*pos, *neg], [1] * len(pos) + [0] * len(neg), groups=groups, heads=heads, seed=m.seed)
    named = ", ".join(f"{head['layer']}.{head['head']}" for head in vector.provenance["heads"])
    return NewArm(vector, note=f"heads (layer.head) {named}; at all positions, where it was published for generated ones")


MAKERS: dict[str, tuple[Kind, Callable[[ArmInputs], NewArm]]] = {
    RANDOM: ("control", _random),
    SHUFFLED: ("control", _shuffled),
    "SAE feature named": ("method", _feature_given),
    "SAE feature by AUROC": ("method", _feature_auroc),
    "SAE feature by output score": ("method", _feature_output),
    "SAE-TS": ("method", _targeted),
    "ActAdd": ("method", _actadd),
    "DiffMean": ("method", _diffmean),
    "PCA of differences": ("method", _pca),
    "principal direction": ("method", _principal),
    "ITI": ("method", _iti),
}
