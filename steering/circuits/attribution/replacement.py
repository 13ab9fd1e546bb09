"""The local replacement model of one prompt: MLPs become transcoders plus a constant error at each position, attention patterns and the
scales of norms are those of the model's own pass. Everything between features is then linear (Ameisen et al. 2025, Circuit Tracing).

p positions · d width of the stream · n active features of a layer · f features · l layers · v vocabulary
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.attribution.transcoders import Transcoder
from steering.circuits.model_graph.frozen import Internals, frozen, internals
from steering.circuits.model_graph.hooking import Latest, change_input

FROZEN = ("norms", "patterns")
STREAM = "resid_pre.0"


class Active(NamedTuple):
    """A layer's features that are active somewhere, by position and then by number."""

    position_n: Tensor
    feature_n: Tensor
    value_n: Tensor
    """activations"""


class Read(NamedTuple):
    """The result of a pass: the inputs of features and logits."""

    input_lpd: Mapping[int, Tensor]
    """by layer, the input of its transcoder"""
    final_pd: Tensor
    """the input of the unembedding"""

    def detached(self) -> "Read":
        return Read({layer: x_pd.detach() for layer, x_pd in self.input_lpd.items()}, self.final_pd.detach())


@dataclass(frozen=True, eq=False)
class Sources:
    """The inputs of the linear model."""

    embed_pd: Tensor
    """block 0's input"""
    written_lpd: Sequence[Tensor]
    """for each layer the sum of its features, their bias and its error; a skip connection is added to it"""


class LocalReplacement:
    """Raises `InputError` for a model whose norms or attention cannot be frozen, and for one whose unembedding cannot be found."""

    def __init__(self, lm: LanguageModel, transcoders: Mapping[int, Transcoder], ids_sp: Tensor, skip_positions: int = 0):
        """`ids_sp` is one prompt, [1, p]. At the first `skip_positions`, features count as error."""
        if ids_sp.shape[0] != 1 or ids_sp.shape[1] <= skip_positions:
            raise InputError(
                f"expected one prompt of more than {skip_positions} tokens, at the first of which features are left out, got "
                f"{ids_sp.shape[0]} of {ids_sp.shape[1]}; give a longer one"
            )
        self.lm, self.transcoders, self.ids_sp, self.skip_positions = lm, transcoders, ids_sp, skip_positions
        unembedding = lm.model.get_output_embeddings()
        if not isinstance(unembedding, nn.Module) or getattr(unembedding, "weight", None) is None:
            raise InputError(f"expected {lm.name!r} to have an unembedding with a weight, found none")
        self.unembedding: Any = unembedding
        self.own: Read
        self.own_logits_v: Tensor
        self.active: list[Active] = []
        self.error_lpd: list[Tensor] = []
        self._observe()

    @torch.no_grad()
    def _observe(self) -> None:
        """One pass of the model itself."""
        seen, final = dict[str, Tensor](), Latest()
        outs = [f"mlp_out.{layer}" for layer in range(self.lm.n_layers)]
        sites = [STREAM, *outs, *(one.site for one in self.transcoders.values())]

        def see(site: str, value_spd: Tensor) -> Tensor:
            seen[site] = value_spd[0].clone()
            return value_spd

        with internals(self.lm, FROZEN) as kept, ExitStack() as stack:
            stack.enter_context(self.lm.edited({site: partial(see, site) for site in sites}))
            stack.callback(change_input(self.unembedding, final.unchanged))
            self.own_logits_v = self.lm.logits(self.ids_sp)[0, -1].clone()
        self.kept = Internals({name: scale.clone() for name, scale in kept.scales.items()}, kept.patterns)
        self.own = Read({layer: one.read(seen[one.site]) for layer, one in self.transcoders.items()}, final.value[0])
        self.embed_pd, written_lpd = seen[STREAM], []
        for layer, out in enumerate(outs):
            written_pd, one = seen[out], self.transcoders.get(layer)
            if one is None:
                nothing = torch.zeros(0, dtype=torch.long, device=written_pd.device)
                self.active.append(Active(nothing, nothing, written_pd.new_zeros(0)))
                self.error_lpd.append(written_pd)
                written_lpd.append(written_pd)
                continue
            dictionary, x_pd = one.dictionary, self.own.input_lpd[layer]
            acts_pf = self.gated(layer, x_pd)
            position_n, feature_n = acts_pf.nonzero(as_tuple=True)
            self.active.append(Active(position_n, feature_n, acts_pf[position_n, feature_n]))
            self.error_lpd.append(written_pd - dictionary.decode(acts_pf, x_pd))
            skipped_pd = dictionary.baseline(x_pd) - dictionary.b_dec_o if dictionary.decodes_with_input else 0
            written_lpd.append(written_pd - skipped_pd)
        self.sources = Sources(self.embed_pd, written_lpd)

    def gated(self, layer: int, x_pd: Tensor) -> Tensor:
        """Activations [p, f] of a layer's features; 0 at the positions that are left out."""
        acts_pf = self.transcoders[layer].dictionary.encode(x_pd)
        acts_pf[: self.skip_positions] = 0
        return acts_pf

    @cached_property
    def rows_lud(self) -> list[tuple[Tensor, Tensor]]:
        """Of each layer the decoder rows [u, d] of features that are active somewhere, and the row of each active one [n]."""
        found = []
        for layer, active in enumerate(self.active):
            if len(active.feature_n):
                unique_u, row_n = active.feature_n.unique(return_inverse=True)
                found.append((self.transcoders[layer].dictionary.rows(unique_u), row_n))
            else:
                found.append((self.embed_pd.new_zeros(0, self.lm.d_model), active.feature_n))
        return found

    def linear(self, sources: Sources) -> Read:
        """A pass of the linear model, in which every activation and error is that of `sources`; gradients flow to these."""
        return self._frozen(sources.embed_pd, {layer: partial(self._written, layer, sources) for layer in range(self.lm.n_layers)})

    def responding(self, added: Mapping[int, Tensor], embed_pd: Tensor | None = None) -> Read:
        """A pass in which features respond to their inputs through their gates; errors, patterns and scales are fixed.

        `added`: by layer the vector added to the written output, [p, d].
        """

        def written(layer: int, x_pd: Tensor | None) -> Tensor:
            if x_pd is None:
                new_pd = self.error_lpd[layer]
            else:
                new_pd = self.transcoders[layer].dictionary.decode(self.gated(layer, x_pd), x_pd) + self.error_lpd[layer]
            return new_pd + added[layer] if layer in added else new_pd

        embed_pd = self.embed_pd if embed_pd is None else embed_pd
        return self._frozen(embed_pd, {layer: partial(written, layer) for layer in range(self.lm.n_layers)})

    @torch.no_grad()
    def real(self, added: Mapping[int, Tensor], embed_pd: Tensor | None = None) -> Read:
        """A pass of the model itself, nothing frozen; `added`: by layer the vector added to its MLP's output, [p, d]."""
        edits: dict[str, Any] = {f"mlp_out.{layer}": lambda value, more=more_pd: value + more for layer, more_pd in added.items()}
        if embed_pd is not None:
            edits[STREAM] = lambda value: embed_pd[None].to(value)
        with self._watched(edits) as read:
            self.lm.logits(self.ids_sp)
        return read()

    def logits(self, final: Tensor) -> Tensor:
        """The unembedding's output, [..., v], before a soft cap or factor of the model."""
        return self.unembedding.forward(final)

    def _written(self, layer: int, sources: Sources, x_pd: Tensor | None) -> Tensor:
        written_pd = sources.written_lpd[layer]
        if x_pd is None or not self.transcoders[layer].dictionary.decodes_with_input:
            return written_pd
        return self.transcoders[layer].dictionary.completed(written_pd, x_pd)

    def _frozen(self, embed_pd: Tensor, written: Mapping[int, Any]) -> Read:
        """`written` returns each MLP's replaced output, from the input of its transcoder."""
        reads: dict[int, Tensor] = {}

        def write(layer: int, value_spd: Tensor) -> Tensor:
            return written[layer](reads.get(layer))[None].to(value_spd)

        edits: dict[str, Any] = {STREAM: lambda value: embed_pd[None].to(value)}
        edits |= {f"mlp_out.{layer}": partial(write, layer) for layer in range(self.lm.n_layers)}
        with frozen(self.lm, FROZEN, self.kept), self._watched(edits, reads) as read:
            self.lm.logits(self.ids_sp)
        return read()

    @contextmanager
    def _watched(self, edits: dict[str, Any], reads: dict[int, Tensor] | None = None) -> Iterator[Any]:
        """Yields a function that returns the latest pass inside; with `reads`, no gradient flows into MLPs."""
        kept, final, cut = dict[int, Tensor]() if reads is None else reads, Latest(), reads is not None

        def read_at(layer: int, value_spd: Tensor) -> Tensor:
            kept[layer] = self.transcoders[layer].read(value_spd[0])
            return value_spd.detach() if cut and self.transcoders[layer].site == f"mlp_in.{layer}" else value_spd

        edits = edits | {one.site: partial(read_at, layer) for layer, one in self.transcoders.items()}
        for layer in range(self.lm.n_layers) if cut else ():
            edits.setdefault(f"mlp_in.{layer}", Tensor.detach)
        with self.lm.edited(edits), ExitStack() as stack:
            stack.callback(change_input(self.unembedding, final.unchanged))
            yield lambda: Read(kept, final.value[0])
