"""Inference-time intervention: directions in the outputs of the attention heads whose probes tell true from false best.

n texts · l layers · h heads · e width of a head
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import progress
from sae.text_input import text_list
from steering.directions.contrast import activations, digest, warn_if_uncertain
from steering.vector import SteeringVector

BATCH = 16
UNEQUAL = 1.5  # benchmarks have more wrong answers than right ones; past this it is worth a warning


def fit_iti(
    lm: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    groups: Sequence[int] | None = None,
    heads: int = 48,
    direction: Literal["mass_mean", "probe"] = "mass_mean",
    tuning_texts: Sequence[str] | None = None,
    validation: float = 0.2,
    seed: int = 0,
) -> SteeringVector:
    """v_{l,h} = σ_{l,h} · θ_{l,h}/‖θ_{l,h}‖ at the `heads` best heads, over all their head_out sites; the coefficient is α (published: 15).

    Li et al. 2023 (arXiv 2306.03341). z_{l,h} is a head's output at a text's last token. One logistic regression per head is fit on
    1 − `validation` of the groups (texts of one question share a group and stay together; without `groups` each text is its own), and
    heads are ranked by accuracy on the others, equal ones by layer and head. θ is mean(label 1) − mean(label 0) of all texts
    ("mass_mean") or the probe's weights ("probe"); σ is the standard deviation of z · θ/‖θ‖ over `tuning_texts`, by default the texts.
    Use it with `steered(lm, [(v, α)], positions="generated", ...)` in generation as in multiple choice (`steering.studies.truthfulqa`).
    Warns when a class is tiny or they are unequal; raises `InputError` when a class is missing, or for more heads than there are.
    """
    texts = text_list(texts)
    tuning_texts = None if tuning_texts is None else text_list(tuning_texts, "tuning_texts")
    label_n, group_n = _checked(texts, labels, groups, direction, validation)
    z_nlhe = head_outputs(lm, texts)
    _, n_layers, n_heads, _ = z_nlhe.shape
    if not 1 <= heads <= n_layers * n_heads:
        raise InputError(f"expected 1 to {n_layers * n_heads} heads of {lm.name!r}, got {heads}")
    held_n = _held_out(label_n, group_n, validation, seed)
    accuracy_lh, weight_lhe = _probes(z_nlhe, label_n, held_n)
    best = [divmod(int(i), n_heads) for i in np.argsort(-accuracy_lh.reshape(-1), kind="stable")[:heads]]
    layer_k, head_k = torch.tensor(best).T
    z_nke = z_nlhe[:, layer_k, head_k]
    counts = int((label_n == 1).sum()), int((label_n == 0).sum())
    mass_mean = _mass_mean(z_nke, torch.from_numpy(label_n == 1))
    warn_if_uncertain(mass_mean, *counts, what="the mean difference at these heads", at_most=UNEQUAL, seed=seed)
    if direction == "mass_mean":
        theta_ke = mass_mean(*map(torch.ones, counts)).reshape(heads, -1)
    else:
        theta_ke = torch.nn.functional.normalize(weight_lhe[layer_k, head_k], dim=-1)
    tuning_nke = z_nke if tuning_texts is None else head_outputs(lm, tuning_texts)[:, layer_k, head_k]
    sigma_k = torch.einsum("nke,ke->nk", tuning_nke, theta_ke).std(0, correction=0)
    provenance = {
        "method": "iti",
        "model": lm.name,
        "direction": direction,
        "positive": counts[0],
        "negative": counts[1],
        "groups": len(set(group_n.tolist())),
        "validation": validation,
        "seed": seed,
        "data": digest(texts),
        "tuning": len(tuning_nke),
        "heads": [
            {"layer": layer, "head": head, "accuracy": float(accuracy_lh[layer, head]), "sigma": float(sigma)}
            for (layer, head), sigma in zip(best, sigma_k)
        ],
    }
    return SteeringVector(_by_site(best, sigma_k[:, None] * theta_ke, n_heads), provenance)


def _mass_mean(z_nke: Tensor, positive_n: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Takes how often each positive and each negative text counts; returns the heads' differences of means, each of norm 1, in one row."""

    def direction_of(pos_n: Tensor, neg_n: Tensor) -> Tensor:
        means = [torch.einsum("n,nke->ke", w / w.sum(), z) for w, z in ((pos_n, z_nke[positive_n]), (neg_n, z_nke[~positive_n]))]
        return torch.nn.functional.normalize(means[0] - means[1], dim=-1).flatten()

    return direction_of


def head_outputs(lm: LanguageModel, texts: Sequence[str]) -> Tensor:
    """Each head's output at the last token of each text, before the output projection, float32 [n, l, h, e] on the CPU."""
    texts = text_list(texts)
    sites = [f"head_out.{layer}" for layer in range(lm.n_layers)]
    widths = {lm.width(site) for site in sites}
    n_heads: int = lm.model.config.get_text_config().num_attention_heads
    if len(widths) > 1 or min(widths) % n_heads:
        raise InputError(f"expected all layers of {lm.name!r} to have {n_heads} heads of one width, got outputs of {sorted(widths)}")
    parts = []
    for first in range(0, len(texts), BATCH):
        ids_sp, mask_sp = lm.encode(texts[first : first + BATCH])
        recorded = lm.record(ids_sp, sites, mask_sp)
        parts.append(torch.stack([recorded[site][:, -1].float().cpu() for site in sites], dim=1))  # host sync
    if not parts:
        raise InputError("expected texts to take activations from, got none")
    z_nlx = torch.cat(parts)
    activations(z_nlx.flatten(1), "head outputs")
    return z_nlx.unflatten(-1, (n_heads, -1))


def _checked(
    texts: Sequence[str], labels: Sequence[int], groups: Sequence[int] | None, direction: str, validation: float
) -> tuple[np.ndarray, np.ndarray]:
    if direction not in ("mass_mean", "probe") or not 0 < validation < 1:
        raise InputError(f'expected direction "mass_mean" or "probe" and validation between 0 and 1, got {direction!r} and {validation}')
    group_n = np.arange(len(texts)) if groups is None else np.asarray(groups)
    if not len(texts) == len(labels) == len(group_n):
        raise InputError(f"expected a label and a group for each text, got {len(labels)} and {len(group_n)} for {len(texts)} texts")
    if set(labels) != {0, 1}:
        raise InputError(f"expected texts of both labels, 1 and 0, got {sorted(set(labels))}")
    return np.asarray(labels), group_n


def _held_out(label_n: np.ndarray, group_n: np.ndarray, validation: float, seed: int) -> np.ndarray:
    """True for the texts of a random share of the groups, bool [n]; both sides need both labels."""
    names = np.unique(group_n)
    drawn = np.random.default_rng(seed).permutation(names)[: max(1, round(validation * len(names)))]
    held_n = np.isin(group_n, drawn)
    for which, side_n in (("fit the probes on", ~held_n), ("validate them on", held_n)):
        if len(np.unique(label_n[side_n])) < 2:
            raise InputError(f"expected texts of both labels to {which}, got {side_n.sum()} texts without one; give more, or another seed")
    return held_n


def _probes(z_nlhe: Tensor, label_n: np.ndarray, held_n: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Accuracy [l, h] on held-out texts, and weights [l, h, e], of a logistic regression for each head."""
    from sklearn.linear_model import LogisticRegression

    array_nlhe = z_nlhe.numpy()
    _, n_layers, n_heads, width = array_nlhe.shape
    accuracy_lh, weight_lhe = np.zeros((n_layers, n_heads)), torch.zeros(n_layers, n_heads, width)
    with progress("probes", n_layers * n_heads, "heads") as bar:
        for layer, head in np.ndindex(n_layers, n_heads):
            z_ne = array_nlhe[:, layer, head]
            probe = LogisticRegression(max_iter=1000).fit(z_ne[~held_n], label_n[~held_n])
            accuracy_lh[layer, head] = probe.score(z_ne[held_n], label_n[held_n])
            weight_lhe[layer, head] = torch.from_numpy(probe.coef_[0])
            bar.advance(1)
    return accuracy_lh, weight_lhe


def _by_site(best: list[tuple[int, int]], value_ke: Tensor, n_heads: int) -> dict[str, Tensor]:
    """The chosen heads' rows in their places in head_out, zero elsewhere."""
    directions: dict[str, Tensor] = {}
    width = value_ke.shape[1]
    for (layer, head), value_e in sorted(zip(best, value_ke), key=lambda item: item[0]):
        site_d = directions.setdefault(f"head_out.{layer}", torch.zeros(n_heads * width))
        site_d[head * width : (head + 1) * width] = value_e
    return directions
