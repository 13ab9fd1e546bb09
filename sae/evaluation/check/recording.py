"""The values at all tried sites on one short text: recorded once, so that each way to use a dictionary costs no forward pass.

n rows (tokens of the text) · s sequences · p positions · d width of a site
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.activations.harvest.massive import is_massive
from sae.activations.text.documents import TextConfig, documents
from sae.activations.text.tokens import Cutter, tokenise
from sae.errors import InputError
from sae.model.sites import parse_site

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel

CONTEXT = 64
"""tokens in a sequence: short ones are many, and the intervals draw whole sequences"""
BATCH = 16
"""sequences in one forward pass"""


class Point(NamedTuple):
    """The place, and the pass, in which a value is recorded."""

    site: str
    bos: bool
    """a beginning-of-text token precedes each sequence"""
    before_norm: bool = False
    """before the norm that follows the attention or the MLP"""
    other: bool = False
    """in the other model"""


def read_sequences(lm: "LanguageModel", text: TextConfig, tokens: int) -> list[np.ndarray]:
    """The first `tokens` tokens of the text, in sequences without a beginning-of-text token. Raises `InputError` for fewer than two."""
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    cutter = Cutter(min(CONTEXT, lm.context) - 1, tokens, None, 0, 0.0)
    parts = list(cutter.parts(tokenise(documents(text), lm.tokenizer, vocabulary, lm.bos_id)))
    found = [part.ids[slice(*part.sequence_starts[[i, i + 1]])] for part in parts for i in range(len(part.sequence_starts) - 1)]
    found = [ids for ids in found if len(ids) > 1]
    if len(found) < 2:
        raise InputError(f"expected text of at least two sequences of two tokens, got {len(found)}; give more with --text")
    return found


class Recorder:
    """Rows are the tokens of all sequences, in order; the same for everything recorded."""

    def __init__(self, lm: "LanguageModel", sequences: Sequence[np.ndarray], other: "LanguageModel | None" = None):
        self.lm, self.other, self.sequences = lm, other, sequences
        lengths = [len(ids) for ids in sequences]
        self.sequence_n = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        self.position_n = torch.cat([torch.arange(length) for length in lengths])
        self.massive_n = torch.zeros(len(self.sequence_n), dtype=torch.bool)
        """rows with a massive norm at one of the points of `begin`; nothing is measured on them"""
        self._values: dict[Point, Tensor] = {}
        self._value_bias: dict[str, Tensor] = {}

    def begin(self, points: Iterable[Point]) -> None:
        """Records these points and determines which rows are massive."""
        points = list(points)
        self.record(points)
        for point in points:
            self.massive_n |= is_massive(self._values[point].norm(dim=-1))

    def record(self, points: Iterable[Point]) -> None:
        """One pass for each requested model and beginning. Raises `InputError` for values that are not finite."""
        passes: dict[tuple[bool, bool], list[Point]] = {}
        for point in points:
            if point not in self._values:
                passes.setdefault((point.other, point.bos), []).append(point)
        for (_, bos), wanted in passes.items():
            lm = self.model(wanted[0])
            for point, x_nd in zip(wanted, _record(lm, self.sequences, wanted, bos), strict=True):
                if not x_nd.isfinite().all():
                    raise InputError(f"expected finite activations at {point.site} of {lm.name}, found NaN or infinity; check the model")
                self._values[point] = x_nd

    def model(self, point: Point) -> "LanguageModel":
        lm = self.other if point.other else self.lm
        assert lm is not None
        return lm

    def values(self, point: Point) -> Tensor:
        """float32 [n, d], on the CPU."""
        self.record([point])
        return self._values[point]

    def value_bias(self, site: str) -> Tensor:
        """The value at v or head_out when all values equal their bias, [d], which TransformerLens' fold_value_biases removes.

        A stream of zeros becomes the norm's bias alone, and attention over equal values is that value.
        """
        if site in self._value_bias:
            return self._value_bias[site]
        layer = parse_site(site).layer
        with self.lm.edited({f"resid_pre.{layer}": torch.zeros_like}):
            recorded = self.lm.record(torch.tensor([self.sequences[0][:1].tolist()]), [site])
        self._value_bias[site] = recorded[site][0, 0].float().cpu()
        return self._value_bias[site]


def _record(lm: "LanguageModel", sequences: Sequence[np.ndarray], points: Sequence[Point], bos: bool) -> list[Tensor]:
    rows: list[list[Tensor]] = [[] for _ in points]
    first = [lm.bos_id] * bos
    for start in range(0, len(sequences), BATCH):
        some = [[*first, *ids.tolist()] for ids in sequences[start : start + BATCH]]
        longest = max(map(len, some))
        ids_sp = torch.tensor([ids + [ids[0]] * (longest - len(ids)) for ids in some])  # padded behind, where no token looks
        text_sp = torch.tensor([[len(first) <= p < len(ids) for p in range(longest)] for ids in some])
        for kept, x_spd in zip(rows, _values(lm, ids_sp, points)):
            kept.append(x_spd.float().cpu()[text_sp])  # host sync
    return [torch.cat(kept) for kept in rows]


def _values(lm: "LanguageModel", ids_sp: Tensor, points: Sequence[Point]) -> list[Tensor]:
    ahead: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        return lambda _module, args: ahead.update({site: args[0]})

    with ExitStack() as stack:
        for site in {point.site for point in points if point.before_norm}:
            stack.callback(lm.place(site).module.register_forward_pre_hook(keep(site)).remove)
        found = lm.record(ids_sp, sorted({point.site for point in points}))
    return [ahead[point.site].reshape(found[point.site].shape) if point.before_norm else found[point.site] for point in points]
