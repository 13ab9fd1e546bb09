"""Which parts of a model write to the residual stream, which read it, and which writers each reader reads.

Scores, cuts and circuits are tensors over it: r readers · w writers
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sites import parse_site
from sae.model.structure.branches import SIDE_BY_SIDE

EMBED, LOGITS = "embed", "logits"
HEAD_INPUTS = ("q", "k", "v")
STREAM = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class Graph:
    """A writer's edge to each reader after it; the edges are those that MIB counts, with a key and a value for each query head."""

    n_layers: int
    n_heads: int
    parallel: bool = False
    """the MLP reads the same stream as its block's attention, so it does not read that block's heads"""

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.n_heads < 1:
            raise InputError(f"expected at least one layer and one head, got {self.n_layers} and {self.n_heads}")

    @classmethod
    def of(cls, lm: LanguageModel) -> "Graph":
        """Raises `InputError` for a model without heads, and for one some of whose blocks are parallel and others not."""
        n_heads = getattr(lm.model.config.get_text_config(), "num_attention_heads", None)
        if not isinstance(n_heads, int) or n_heads < 1:
            raise InputError(f"expected a model with as many attention heads in every block for a graph, got {lm.name!r} with {n_heads!r}")
        refused = lm.refused_sites()
        parallel = {refused.get(f"resid_mid.{layer}") == SIDE_BY_SIDE for layer in range(lm.n_layers)}
        if len(parallel) > 1:
            raise InputError(f"expected {lm.name!r} to have attention and MLP side by side in all blocks or in none, got both kinds")
        return cls(lm.n_layers, n_heads, parallel.pop())

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """In the order of the pass: "embed", then of each layer "head.L.H" and "mlp.L"."""
        blocks = ([*(f"head.{layer}.{head}" for head in range(self.n_heads)), f"mlp.{layer}"] for layer in range(self.n_layers))
        return (EMBED, *(name for block in blocks for name in block))

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """In the order of the pass: of each layer "q.L.H" of all heads, "k.L.H", "v.L.H" and "mlp_in.L", then "logits"."""
        heads = range(self.n_heads)
        blocks = (
            [*(f"{kind}.{layer}.{head}" for kind in HEAD_INPUTS for head in heads), f"mlp_in.{layer}"] for layer in range(self.n_layers)
        )
        return (*(name for block in blocks for name in block), LOGITS)

    def heads(self, layer: int) -> slice:
        """The writers that are a layer's heads."""
        first = 1 + layer * (self.n_heads + 1)
        return slice(first, first + self.n_heads)

    def mlp(self, layer: int) -> int:
        """The writer that is a layer's MLP."""
        return self.heads(layer).stop

    def head_inputs(self, kind: str, layer: int) -> slice:
        """The readers that are the "q", "k" or "v" of a layer's heads."""
        first = layer * (3 * self.n_heads + 1) + HEAD_INPUTS.index(kind) * self.n_heads
        return slice(first, first + self.n_heads)

    def mlp_in(self, layer: int) -> int:
        """The reader that is a layer's MLP."""
        return self.head_inputs("v", layer).stop

    def block_of(self, reader: int) -> int:
        """The block that a reader belongs to; of "logits", the number of blocks."""
        return reader // (3 * self.n_heads + 1)

    @cached_property
    def seen_r(self) -> Tensor:
        """The number of writers that each reader reads, [r]; they are the first ones."""
        blocks = []
        for layer in range(self.n_layers):
            before = self.heads(layer).start
            blocks += [before] * (3 * self.n_heads) + [before if self.parallel else before + self.n_heads]
        return torch.tensor([*blocks, len(self.writers)])

    @cached_property
    def exists_rw(self) -> Tensor:
        """Whether a reader reads a writer, bool."""
        return torch.arange(len(self.writers)) < self.seen_r[:, None]

    @property
    def n_edges(self) -> int:
        return int(self.seen_r.sum())

    def writer(self, name: str) -> int:
        """Its number among `writers`. Raises `InputError` for a name that is none of them."""
        last = self.n_layers - 1
        return _number(name, self._writer_numbers, f"a writer: embed, head.0.0 to head.{last}.{self.n_heads - 1} or mlp.0 to mlp.{last}")

    def reader(self, name: str) -> int:
        """Its number among `readers`. Raises `InputError` for a name that is none of them."""
        last = self.n_layers - 1
        there_are = f"a reader: q.0.0 to q.{last}.{self.n_heads - 1}, k and v likewise, mlp_in.0 to mlp_in.{last} or logits"
        return _number(name, self._reader_numbers, there_are)

    def edge(self, name: str) -> tuple[int, int]:
        """`"head.0.1->q.2.3"` -> its row (reader) and column (writer). Raises `InputError` for an edge that the graph lacks."""
        writer, arrow, reader = name.partition("->")
        if not arrow:
            raise InputError(f'expected an edge such as "embed->logits", got {name!r}; write the writer, "->" and the reader')
        r, w = self.reader(reader), self.writer(writer)
        if not self.exists_rw[r, w]:
            raise InputError(f"expected a reader that sees its writer, got {name!r}; {writer} writes behind {reader}")
        return r, w

    def edge_name(self, r: int, w: int) -> str:
        return f"{self.writers[w]}->{self.readers[r]}"

    def edges(self, circuit_rw: Tensor) -> list[str]:
        """Names of the edges that a circuit has, the reader's order first. Raises `InputError` as `checked` does."""
        return [self.edge_name(r, w) for r, w in self.checked(circuit_rw).nonzero().tolist()]

    def circuit(self, edges: Iterable[str]) -> Tensor:
        """The circuit of these edges, bool [r, w]. Raises `InputError` for an edge that the graph lacks."""
        circuit_rw = torch.zeros(len(self.readers), len(self.writers), dtype=torch.bool)
        for name in edges:
            circuit_rw[self.edge(name)] = True
        return circuit_rw

    def checked(self, circuit_rw: Tensor) -> Tensor:
        """Returns the tensor unchanged. Raises `InputError` for a tensor that is not a circuit of this graph: bool [r, w] of edges that
        exist."""
        shape = tuple(self.exists_rw.shape)
        if circuit_rw.dtype != torch.bool or tuple(circuit_rw.shape) != shape:
            raise InputError(f"expected a circuit as bool of shape {shape}, got {circuit_rw.dtype} of shape {tuple(circuit_rw.shape)}")
        extra_rw = circuit_rw.cpu() & ~self.exists_rw
        if extra_rw.any():
            r, w = extra_rw.nonzero()[0].tolist()
            raise InputError(f"expected edges of the graph alone, got {self.edge_name(r, w)}, which does not exist; & with exists_rw")
        return circuit_rw

    @cached_property
    def fed_r(self) -> Tensor:
        """The writer that each reader feeds, [r]; of "logits", -1."""
        blocks = []
        for layer in range(self.n_layers):
            heads = self.heads(layer)
            blocks += [*range(heads.start, heads.stop)] * 3 + [self.mlp(layer)]
        return torch.tensor([*blocks, -1])

    def first_behind(self, site: str) -> int:
        """The first reader that reads a change of the stream at `site`. Raises `InputError` for a site that is not of the stream."""
        kind, layer = parse_site(site, self.n_layers)
        if kind not in STREAM:
            raise InputError(f"expected a site of the residual stream ({', '.join(STREAM)}), got {site}")
        if kind == "resid_mid":
            return self.mlp_in(layer)
        return self.head_inputs("q", layer + (kind == "resid_post")).start

    def cuts(self) -> dict[str, Tensor]:
        """By the name of a point of the stream, the edges across it, bool [r, w]: everything in the model passes along them."""
        found = {}
        for layer in range(self.n_layers):
            found[f"resid_pre.{layer}"] = self._across(self.heads(layer).start, self.head_inputs("q", layer).start)
            if not self.parallel:
                found[f"resid_mid.{layer}"] = self._across(self.mlp(layer), self.mlp_in(layer))
        found[f"resid_post.{self.n_layers - 1}"] = self._across(len(self.writers), len(self.readers) - 1)
        return found

    def _across(self, writers: int, first_reader: int) -> Tensor:
        across_rw = torch.zeros_like(self.exists_rw)
        across_rw[first_reader:, :writers] = True
        return across_rw

    def prune(self, circuit_rw: Tensor) -> Tensor:
        """Only the edges on a path from "embed" to "logits" in the circuit, bool [r, w]. Raises `InputError` as `checked` does."""
        kept_rw = self.checked(circuit_rw).cpu()
        reached_w = torch.zeros(len(self.writers), dtype=torch.bool)
        needed_w = reached_w.clone()
        for w in range(len(self.writers)):  # forwards, then backwards
            reached_w[w] = w == 0 or bool((kept_rw[self.fed_r == w] & reached_w).any())
        for w in reversed(range(len(self.writers))):
            readers = kept_rw[:, w].nonzero().flatten()
            needed_w[w] = any(fed < 0 or bool(needed_w[fed]) for fed in self.fed_r[readers].tolist())
        needed_r = torch.tensor([fed < 0 or bool(needed_w[fed]) for fed in self.fed_r.tolist()])
        return (kept_rw & reached_w & needed_r[:, None]).to(circuit_rw.device)

    @cached_property
    def _writer_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.writers)}

    @cached_property
    def _reader_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.readers)}


def _number(name: str, numbers: dict[str, int], expected: str) -> int:
    if name not in numbers:
        raise InputError(f"expected {expected}, got {name!r}")
    return numbers[name]
