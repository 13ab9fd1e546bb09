"""Sequences of one length from a text, with their labels, and coefficients for steering on them.

s sequences · p positions · n positions of all sequences · d width of the site · v vocabulary
"""

from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.text.documents import TextConfig, check_source, documents
from sae.activations.text.tokens import tokenise
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.strength.calibration import KLSearch, SteeredTexts, coefficient_for_kl
from steering.vector import SteeringVector

FIRST_DROPPED = 4  # as steering/directions/pca.py: a text's first tokens can be so long that they are the first component
BATCH = 64
READ_FACTOR = 20  # documents that are looked at for each one that is taken


class Sequences(NamedTuple):
    ids_sp: Tensor
    """the beginning of one document each, after a beginning-of-text token if the model has one"""
    label_s: np.ndarray
    """int64, index into `labels`; -1 for none"""
    labels: list[str]
    first: int
    """the first column that counts: those before are beginning-of-text and the first tokens of the text"""

    def part(self, start: int, count: int) -> "Sequences":
        """`count` sequences from number `start` on."""
        rows = slice(start, start + count)
        return self._replace(ids_sp=self.ids_sp[rows], label_s=self.label_s[rows])


def read_sequences(lm: LanguageModel, text: TextConfig, count: int, length: int, seed: int) -> Sequences:
    """The first `length` tokens of `count` documents, in random order; shorter documents are left out.

    Raises `InputError` where the text has too few, or where `length` does not fit the model or leaves nothing after the first tokens.
    """
    check_source(text)
    begin = lm.bos_id is not None
    if not FIRST_DROPPED < length <= lm.context - begin:
        raise InputError(f"expected a length of {FIRST_DROPPED + 1} to {lm.context - begin} tokens, got {length}")
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    found: list[tuple[np.ndarray, str | None]] = []
    seen = 0
    for ids, label in tokenise(islice(documents(text), READ_FACTOR * count), lm.tokenizer, vocabulary, lm.bos_id):
        seen += 1
        if len(ids) >= length:
            found.append((ids[:length], label))
    if len(found) < count:
        raise InputError(
            f"expected {count} documents of at least {length} tokens, found {len(found)} among {seen}; give more text or ask for fewer"
        )
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    labels = sorted({label for _, label in found if label is not None})
    ids_sp = torch.from_numpy(np.stack([found[i][0] for i in order])).long()
    if begin:
        ids_sp = torch.nn.functional.pad(ids_sp, (1, 0), value=lm.bos_id)
    number_of: dict[str | None, int] = {None: -1} | {label: number for number, label in enumerate(labels)}
    label_s = np.array([number_of[found[i][1]] for i in order])
    return Sequences(ids_sp.to(lm.device), label_s, labels, FIRST_DROPPED + begin)


def site_activations(lm: LanguageModel, sequences: Sequences, site: str) -> Tensor:
    """Float32 [s, p, d] on the CPU, of the columns that count."""
    parts = [lm.record(ids, [site])[site][:, sequences.first :].float().cpu() for ids in sequences.ids_sp.split(BATCH)]  # host sync
    return torch.cat(parts)


class KLCalibrator:
    """How far along a direction the model's predictions change by a given KL, on fixed sequences."""

    def __init__(self, lm: LanguageModel, sequences: Sequences, site: str):
        self.texts = SteeredTexts(lm, sequences.ids_sp, torch.ones_like(sequences.ids_sp))
        self.typical_norm = site_activations(lm, sequences, site).norm(dim=-1).median().item()
        """median norm at the site; a unit direction's coefficient divided by it is rho"""
        self._last = 0.3 * self.typical_norm

    def coefficient(self, unit: SteeringVector, budget: float, sign: int = 1) -> KLSearch:
        """The positive coefficient of `sign * unit`, added everywhere, at which KL(unsteered ‖ steered) is `budget` nats per token.

        Within the tolerance of `coefficient_for_kl`: the search begins where the last one ended, so the order changes its result slightly.
        """

        def kl_at(coefficient: float) -> float:
            return self.texts.divergence([(unit, sign * coefficient)]).kl

        found = coefficient_for_kl(kl_at, budget, start=self._last, most=300 * self.typical_norm)
        if found.reached:
            self._last = found.coefficient  # directions of one model need similar ones
        return found
