"""Passes of a model as a graph: the outputs of its parts, passes in which readers read something else, gradients at every reader.

Everything is done by hooks on the unchanged model. The code after the projections (rotation, norms of queries and keys, soft caps,
windows, the attention itself) is the model's own.

s sequences · p positions · d width of the stream · v vocabulary · n some readers · r readers · w writers · h heads · z width of a head
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from sae.errors import InputError
from sae.model.hooks import register
from sae.model.language_model import LanguageModel
from sae.model.structure.norms import Norm
from steering.circuits.model_graph.blocks import Block, HeadInput, find_blocks
from steering.circuits.model_graph.graph import Graph
from steering.circuits.model_graph.hooking import (
    Latest,
    back_through,
    change_input,
    change_output,
    normed,
    projected,
    see,
    see_heads,
    see_stream,
    through_norm,
    weighted,
    widen,
)
from steering.circuits.model_graph.restarting import Outputs, begun_at, find_outputs
from steering.circuits.model_graph.rules import Neurons, find_neurons, gradient_rules, with_constant_scale

Metric: TypeAlias = Callable[[Tensor], Tensor]
"""from logits [s, p, v] to one number for each sequence [s], which depends only on that sequence's logits"""

Added: TypeAlias = Callable[[Sequence[int]], Tensor]
"""gets the numbers of readers that read at one place and returns what is added to the stream as each of them reads it, [n, s, p, d]"""

CHECKED_TOKENS = 4
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""relative to the largest number, by which a pass may differ from the sum of the graph's parts"""


class Run(NamedTuple):
    logits_spv: Tensor
    written_wspd: Tensor
    """the output of every writer"""
    stream_lspd: Tensor | None = None
    """the stream before every block and after the last, if requested"""


class Gradient(NamedTuple):
    """At consecutive readers of the graph."""

    readers: slice
    gradient_nspd: Tensor
    """of the metric, with respect to the stream as each of them reads it"""


class Engine:
    """Of one language model; `graph` says what its readers and writers are.

    The embedding writes block 0's input. A head writes what the output projection makes of it, without that projection's bias; where a
    norm follows, as in Gemma 2, it divides all heads of a block by the scale of their sum, so that what they write still adds up. Raises
    `InputError`, with the reason, for a model that the graph does not describe: two passes of a few tokens check that it does.
    """

    def __init__(self, lm: LanguageModel):
        self.lm, self.graph = lm, Graph.of(lm)
        self._blocks, self._final_norm = find_blocks(lm, self.graph)
        self._embed = lm.place("resid_pre.0")
        self._shape = (0, 0)
        self._refuse_other_models()

    @property
    def restarts(self) -> bool:
        """Whether passes can start at a later block, as in `begun_at`."""
        return self._outputs is not None

    def begun_at(self, layer: int, stream_spd: Tensor) -> AbstractContextManager[None]:
        """Inside, every pass continues from `stream_spd` at block `layer`, or after the last at `n_layers`; earlier blocks are not run.

        Raises `InputError` for a model in which the blocks before it matter otherwise than by the stream.
        """
        if self._outputs is None:
            raise InputError(f"expected a model whose passes can begin at a later block, got {self.lm.name!r}; run it whole")
        return begun_at(self.lm, self._outputs, layer, stream_spd)

    @torch.no_grad()
    def run(self, ids_sp: Tensor, mask_sp: Tensor | None = None, *, streams: bool = False) -> Run:
        """A pass and what its writers write; inside `lm.edited` and `steered`, the edited pass. With `streams`, the stream at every block.

        Held are the logits and one tensor of writers × tokens × width numbers. Padding positions hold meaningless numbers.
        """
        written, stream = list[Tensor](), list[Tensor]()

        def wrote(first: int, now_nspd: Tensor) -> None:
            if first == 0:
                written[:] = [now_nspd.new_empty(len(self.graph.writers), *now_nspd.shape[1:])]
            written[0][first : first + len(now_nspd)] = now_nspd

        with ExitStack() as stack:
            for layer in range(self.graph.n_layers if streams else 0):
                stack.callback(see(self.lm.place(f"resid_pre.{layer}"), lambda x: stream.append(x.clone())))
            if streams:
                stack.callback(see(self.lm.place(f"resid_post.{self.graph.n_layers - 1}"), lambda x: stream.append(x.clone())))
            stack.enter_context(self._watched(wrote))
            logits_spv = self.lm.logits(ids_sp, mask_sp)
        return Run(logits_spv, written[0], torch.stack(stream) if streams else None)

    def writers(self, ids_sp: Tensor, mask_sp: Tensor | None = None) -> Tensor:
        """The output of every writer in a pass, [w, s, p, d], as in `run`."""
        return self.run(ids_sp, mask_sp).written_wspd

    def mean_writers(self, ids_sp: Tensor, mask_sp: Tensor | None = None) -> Tensor:
        """The mean output of each writer over all real tokens, [w, 1, 1, d]."""
        real_sp = torch.ones_like(ids_sp) if mask_sp is None else mask_sp
        written_wnd = self.writers(ids_sp, mask_sp)[:, real_sp.bool()]
        return written_wnd.mean(1)[:, None, None]

    def zero_writers(self) -> Tensor:
        """[w, 1, 1, d]"""
        return torch.zeros(len(self.graph.writers), 1, 1, self.lm.d_model, dtype=self.lm.dtype, device=self.lm.device)

    @contextmanager
    def patched(self, corrupt_wspd: Tensor, cut_rw: Tensor, *, rows_s: Tensor | None = None, clean: Run | None = None) -> Iterator[None]:
        """Inside, reader r of every pass reads the stream plus Σ_w cut[r, w] · (corrupt_w − what w writes in this pass).

        `corrupt_wspd` is what `writers`, `mean_writers` or `zero_writers` gave, or anything that broadcasts to it. `cut_rw` is 0 where an
        edge stays and 1 where it is cut, or anything between; it may ask for gradients, and may be given for each sequence, [s, r, w].
        Readers none of whose edges is cut keep every bit. With `rows_s`, sequence s of a pass is sequence rows[s] of `corrupt_wspd` and
        `clean`. With `clean`, a run of those sequences with its streams, passes begin at the block of the first reader with a cut edge.

        Held are the differences of the writers of cut edges and, while a place is read, one stream for each of its changed readers. Raises
        `InputError` for a cut of another shape or of edges that do not exist, and as `begun_at` does.
        """
        graph, shape = self.graph, tuple(self.graph.exists_rw.shape)
        if cut_rw.ndim not in (2, 3) or tuple(cut_rw.shape[-2:]) != shape:
            raise InputError(f"expected a cut of {shape[0]} readers by {shape[1]} writers, got shape {tuple(cut_rw.shape)}")
        cut_srw = cut_rw if cut_rw.ndim == 3 else cut_rw[None]
        nonzero_rw = (cut_srw.detach() != 0).any(0).cpu()
        if (nonzero_rw & ~graph.exists_rw).any():
            raise InputError("expected a cut of edges of the graph alone, got one of edges that do not exist; multiply it by exists_rw")
        touched_rw = graph.exists_rw if cut_rw.requires_grad else nonzero_rw
        cut_srw, differences, touched_w = cut_srw.to(self.lm.device), dict[int, tuple[Tensor, Tensor]](), touched_rw.any(0)
        touched = touched_rw.any(1).nonzero().flatten().tolist()
        begun = graph.block_of(touched[0]) if touched and clean is not None else 0

        def of_rows(value_wspd: Tensor, writers: Tensor) -> Tensor:
            value_mspd = value_wspd[writers.to(value_wspd.device)]
            return value_mspd if rows_s is None or value_mspd.shape[1] == 1 else value_mspd[:, rows_s]

        def wrote(first: int, now_nspd: Tensor) -> None:
            writers = first + touched_w[first : first + len(now_nspd)].nonzero().flatten()
            now_mspd = now_nspd if len(writers) == len(now_nspd) else now_nspd[(writers - first).to(now_nspd.device)]
            differences[first] = writers, of_rows(corrupt_wspd, writers).to(now_nspd) - now_mspd

        def added(readers: Sequence[int]) -> Tensor:
            parts = []
            for writers, difference_mspd in differences.values():
                if touched_rw[readers][:, writers].any():  # none that writes after them
                    parts.append(weighted(cut_srw[:, readers][:, :, writers.to(cut_srw.device)], difference_mspd))
            return sum(parts[1:], start=parts[0])

        with ExitStack() as stack:
            if clean is not None and begun:
                if clean.stream_lspd is None:
                    raise InputError("expected a clean run with its streams, got one without; call run with streams=True")
                stream_spd = clean.stream_lspd[begun]
                stack.enter_context(self.begun_at(begun, stream_spd if rows_s is None else stream_spd[rows_s]))
                writers = touched_w[: 1 + begun * (graph.n_heads + 1)].nonzero().flatten()
                now_mspd = of_rows(clean.written_wspd, writers)
                differences[0] = writers, of_rows(corrupt_wspd, writers).to(now_mspd) - now_mspd
            if touched:
                stack.enter_context(self._watched(wrote, touched_w, begun))
                stack.enter_context(self.reading(touched, added))
            yield

    @contextmanager
    def reading(self, readers: Collection[int], added: Added) -> Iterator[None]:
        """Inside, each of `readers` reads the stream plus what `added` returns for it: its own norm and projection are run on the sum.

        The others keep every bit, but for those of a block of grouped-query attention one of whose keys or values is changed: its
        attention then runs with a key and a value for each query head, which other kernels may compute.
        """
        own, logits = set(readers), len(self.graph.readers) - 1
        with self._begun() as stack:
            for layer, block in enumerate(self._blocks):
                self._change_heads(stack, layer, block, own, added)
                if (reader := self.graph.mlp_in(layer)) in own:
                    self._change_mlp(stack, block, reader, added)
            if logits in own:
                stack.callback(change_input(self._final_norm, lambda x_spd: x_spd + added([logits])[0]))
            yield

    def _change_heads(self, stack: ExitStack, layer: int, block: Block, own: set[int], added: Added) -> None:
        changed: dict[nn.Module, list[tuple[HeadInput, list[int], int]]] = {}
        for kind, one in block.inputs.items():
            readers = self.graph.head_inputs(kind, layer)
            if heads := [r - readers.start for r in range(readers.start, readers.stop) if r in own]:
                changed.setdefault(one.module, []).append((one, heads, readers.start))
        if not changed:
            return
        stream = Latest()
        stack.callback(see_stream(block.attention_norm, block.attention_in, stream))
        if any(one.shared > 1 for parts in changed.values() for one, *_ in parts):
            widen(stack, block)

        def change(module: nn.Module, output: Tensor) -> Tensor:
            for one, heads, first in changed[module]:
                x_nspd = stream.value.view(*self._shape, -1) + added([first + head for head in heads])
                new_nspz = projected(one, heads, normed(block.attention_norm, x_nspd))
                columns = one.columns_hz[heads].flatten()
                new = new_nspz.permute(1, 2, 0, 3).reshape(*output.shape[:-1], len(columns))
                output = output.index_copy(-1, columns, new.to(output.dtype))
            return output

        for module in changed:
            stack.callback(change_output(module, partial(change, module)))

    def _change_mlp(self, stack: ExitStack, block: Block, reader: int, added: Added) -> None:
        stream = Latest()
        stack.callback(see_stream(block.mlp_norm, block.mlp_in, stream))

        def change(raw: Tensor, _received: Tensor) -> Tensor:
            x_spd = stream.value.view(*self._shape, -1) + added([reader])[0]
            return normed(block.mlp_norm, x_spd).to(raw.dtype).view_as(raw)

        stack.callback(register(block.mlp_in, change))

    def gradients(
        self, ids_sp: Tensor, mask_sp: Tensor | None, metric: Metric, first_layer: int = 0, rules: Collection[str] = ()
    ) -> tuple[Tensor, Iterator[Gradient]]:
        """The metric of a pass [s], and its gradients at the readers from `first_layer` on; inside an edit, those of the edited pass.

        With `rules`, some of `RULES` of the module `rules`, the gradients follow them. Held until the last is taken are the stream as each
        norm reads it and the gradient of each projection's output; of the gradients at readers, only those that are being taken. Raises
        `InputError` for a metric that is not one number for each sequence, and for rules that cannot be in force in this model.
        """
        streams: dict[tuple[int, str], Tensor] = {}
        seen: dict[tuple[int, nn.Module | None], Tensor] = {}  # None: what the MLP, or after the last layer the final norm, gets
        layers, last = range(first_layer, self.graph.n_layers), (self.graph.n_layers, None)

        def keep_stream(layer: int, branch: str, x: Tensor) -> None:
            streams[layer, branch] = x.detach().clone().view(*self._shape, -1)

        def keep(key: tuple[int, nn.Module | None], raw: Tensor) -> Tensor:
            seen[key] = raw.view_as(raw)
            return seen[key]

        def keep_input(layer: int, raw: Tensor, _received: Tensor) -> Tensor:
            return keep((layer, None), raw)

        neurons = self._neurons if not {"activations", "gates"}.isdisjoint(rules) else []
        with self._begun() as stack, torch.enable_grad():
            stack.enter_context(gradient_rules(self.lm, rules, neurons))
            stack.callback(register(self._embed, lambda raw, _: raw.detach().clone().requires_grad_().clone()))
            for layer in layers:
                block = self._blocks[layer]
                stack.callback(see_stream(block.attention_norm, block.attention_in, partial(keep_stream, layer, "attention")))
                stack.callback(see_stream(block.mlp_norm, block.mlp_in, partial(keep_stream, layer, "mlp")))
                widen(stack, block)
                for module in {one.module for one in block.inputs.values()}:
                    stack.callback(change_output(module, partial(keep, (layer, module))))
                stack.callback(register(block.mlp_in, partial(keep_input, layer)))
            stack.callback(change_input(self._final_norm, partial(keep, last)))
            metric_s = metric(self.lm.logits(ids_sp, mask_sp))
            if not isinstance(metric_s, Tensor) or metric_s.shape != (len(ids_sp),) or not metric_s.requires_grad:
                got = f"shape {tuple(metric_s.shape)}" if isinstance(metric_s, Tensor) else type(metric_s).__name__
                raise InputError(f"expected a metric that makes one number of the logits of each of {len(ids_sp)} sequences, got {got}")
            found = torch.autograd.grad(metric_s.sum(), list(seen.values()), materialize_grads=True)
        gradients, norms = dict(zip(seen, found, strict=True)), self._norms_run("norms" in rules)

        def each() -> Iterator[Gradient]:
            for layer in layers:
                block, x_spd = self._blocks[layer], streams.pop((layer, "attention"))
                back = (back_through(one, gradients[layer, one.module]) for one in block.inputs.values())
                of_inputs = torch.cat([through_norm(norms[layer][0], x_spd, gradient_hspd) for gradient_hspd in back])
                yield Gradient(slice(self.graph.head_inputs("q", layer).start, self.graph.mlp_in(layer)), of_inputs)
                x_spd, reader = streams.pop((layer, "mlp")), self.graph.mlp_in(layer)
                gradient_nspd = gradients[layer, None].view_as(x_spd)[None]
                yield Gradient(slice(reader, reader + 1), through_norm(norms[layer][1], x_spd, gradient_nspd))
            readers = len(self.graph.readers)
            yield Gradient(slice(readers - 1, readers), gradients[last][None])

        return metric_s.detach(), each()

    @cached_property
    def _outputs(self) -> Outputs | None:
        return find_outputs(self.lm, self._few_tokens(), self._rounding)

    @cached_property
    def _neurons(self) -> list[Neurons]:
        return find_neurons(self.lm)

    def _norms_run(self, constant: bool) -> list[tuple[Callable[[Tensor], Tensor] | None, ...]]:
        """For each block, how the norms of attention and MLP are run without the hooks on them; `constant` is the rule "norms"."""
        formulas = {norm.module: norm for norm in self.lm.norms.values() if isinstance(norm, Norm)} if constant else {}

        def run_of(norm: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
            if norm is None:
                return None
            return partial(with_constant_scale, formulas[norm]) if constant else norm.forward

        return [(run_of(block.attention_norm), run_of(block.mlp_norm)) for block in self._blocks]

    @contextmanager
    def _begun(self) -> Iterator[ExitStack]:
        """Records the shape of every pass inside."""

        def note(raw: Tensor) -> None:
            self._shape = (raw.shape[0], raw.shape[1])

        with ExitStack() as stack:
            stack.enter_context(self.lm.edited({}))
            stack.callback(see(self._embed, note))
            yield stack

    @contextmanager
    def _watched(self, wrote: Callable[[int, Tensor], None], wanted_w: Tensor | None = None, begun: int = 0) -> Iterator[None]:
        """`wrote` gets the number of the first of some writers and what they write, [n, s, p, d].

        Not looked at are places with none of the writers `wanted_w`, bool, and those before the block `started`.
        """
        graph = self.graph

        def wrote_mlp(number: int, now: Tensor) -> None:
            wrote(number, now.view(1, *self._shape, -1))

        def wanted(writers: slice) -> bool:
            return wanted_w is None or bool(wanted_w[writers].any())

        with self._begun() as stack:
            if begun == 0 and wanted(slice(0, 1)):
                stack.callback(see(self._embed, lambda now_spd: wrote(0, now_spd[None])))
            for layer in range(begun, graph.n_layers):
                block, heads, mlp = self._blocks[layer], graph.heads(layer), graph.mlp(layer)
                if wanted(heads):
                    stack.callback(see_heads(block, partial(wrote, heads.start)))
                if wanted(slice(mlp, mlp + 1)):
                    stack.callback(see(block.mlp_out, partial(wrote_mlp, mlp)))
            yield

    def _few_tokens(self) -> Tensor:
        known = self.lm.model.get_input_embeddings().num_embeddings
        return (torch.arange(CHECKED_TOKENS) + known // 2)[None] % known

    @property
    def _rounding(self) -> float:
        return ROUNDING.get(self.lm.dtype, max(ROUNDING.values()))

    @torch.no_grad()
    def _refuse_other_models(self) -> None:
        """Raises `InputError` unless the last stream is the sum of all outputs, and every reader reads the output of its norm and
        projection."""
        lm, graph, stream = self.lm, self.graph, Latest()
        ids_sp = self._few_tokens()
        with lm.unedited(), ExitStack() as stack:
            stack.callback(see_stream(self._final_norm, self._embed, stream))
            logits_spv = lm.logits(ids_sp)
            final_spd = stream.value.view(*ids_sp.shape, -1)
            total_spd = self.writers(ids_sp).sum(0) + sum(block.bias_d for block in self._blocks)
            zero_spd = torch.zeros_like(total_spd)
            with self.reading(range(len(graph.readers)), lambda readers: zero_spd.expand(len(readers), *zero_spd.shape)):
                read_spv = lm.logits(ids_sp)
        for what, found, expected in (
            ("its last stream is not the sum of what its parts write", total_spd, final_spd),
            ("its parts read the stream by more than a norm and a projection", read_spv, logits_spv),
        ):
            if not (found - expected).abs().max() <= self._rounding * expected.abs().max():  # host sync
                raise InputError(f"expected {lm.name!r} to be a model that the graph describes, but {what}")
