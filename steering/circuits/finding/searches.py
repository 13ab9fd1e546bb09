"""Circuits by running them: exact patching of single edges, and edges removed one after the other while the predictions stay the same.

s sequences of a batch · p positions · v vocabulary · n pairs · r readers · w writers · c circuits of a batch
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.progress import Progress
from steering.circuits.finding.metrics import top_edges
from steering.circuits.model_graph.engine import Engine, Run
from steering.circuits.tasks.prompts import Prompts

BATCH = 64
"""sequences of a pass: pairs times circuits"""


class Found(NamedTuple):
    circuit_rw: Tensor
    runs: int
    """circuits that were run"""
    kl: float
    """mean KL of the circuit's predictions to the model's, in nats"""


class Patching:
    """Pairs run with only some edges of the model unchanged; called with a circuit it returns the metric of every pair, [n].

    Every other edge carries what it does on the corrupt prompt. Passes begin at the block of the first reader with a cut edge, where the
    model can be run so (`engine.restarts`). Kept for all pairs is what writers write on the corrupt prompts, writers × tokens × width
    numbers, and, once a pass begins later than at the first block, on the clean ones too. Raises `InputError` for pairs whose sides have
    different lengths.
    """

    def __init__(self, engine: Engine, prompts: Prompts, batch: int = BATCH):
        if not prompts.aligned:
            raise InputError(
                "expected pairs of one length, got pieces of different numbers of tokens, so that no position of one "
                "side stands for one of the other; reword the pieces to equal numbers of tokens"
            )
        self.engine, self.graph, self.prompts, self.batch = engine, engine.graph, prompts, batch

    @cached_property
    @torch.no_grad()
    def _corrupt_wspd(self) -> Tensor:
        ids, masks = (x.split(self.batch) for x in (self.prompts.corrupt_np, self.prompts.corrupt_mask_np))
        return torch.cat([self.engine.writers(*part) for part in zip(ids, masks)], dim=1)

    @cached_property
    @torch.no_grad()
    def _clean(self) -> Run:
        """With the streams; without logits, which are in `_clean_nv`."""
        written, streams = list[Tensor](), list[Tensor]()
        for part in zip(self.prompts.clean_np.split(self.batch), self.prompts.clean_mask_np.split(self.batch)):
            run = self.engine.run(*part, streams=True)
            assert run.stream_lspd is not None
            written.append(run.written_wspd)
            streams.append(run.stream_lspd)
        return Run(run.logits_spv[:0], torch.cat(written, dim=1), torch.cat(streams, dim=1))

    @cached_property
    def _clean_nv(self) -> Tensor:
        """Log-probabilities of the unchanged model."""
        return torch.cat([last_nv for _, last_nv in self._passes([self.graph.exists_rw])]).log_softmax(-1)

    def __call__(self, circuit_rw: Tensor) -> np.ndarray:
        return self.metrics([circuit_rw])[0]

    def metrics(self, circuits: Sequence[Tensor]) -> np.ndarray:
        """The metric of every pair for several circuits, [c, n], in as few passes as the batch allows."""
        found_cn = torch.zeros(len(circuits), len(self.prompts), dtype=torch.float64)
        for places, last_sv in self._passes(circuits):
            pairs = self.prompts.subset([n for _, n in places])
            for (c, n), value in zip(places, pairs.measure(last_sv).tolist()):  # host sync
                found_cn[c, n] = value
        return found_cn.numpy()

    def kls(self, circuits: Sequence[Tensor]) -> list[float]:
        """For each circuit, the mean KL of its predictions at the last position to the model's: Σ p log(p / p of the circuit)."""
        total_c = torch.zeros(len(circuits), dtype=torch.float64)
        for places, last_sv in self._passes(circuits):
            kl_s = _kl(self._clean_nv[[n for _, n in places]], last_sv)
            total_c.index_add_(0, torch.tensor([c for c, _ in places]), kl_s.double().cpu())
        return (total_c / len(self.prompts)).tolist()

    def kl_of_cut(self, rows_s: Tensor, cut_srw: Tensor) -> Tensor:
        """For some pairs, by number, the KL of the predictions under a cut to the model's, [s]; gradients flow to the cut."""
        prompts, rows_s = self.prompts, rows_s.to(self.prompts.clean_np.device)
        with self.engine.patched(self._corrupt_wspd, cut_srw, rows_s=rows_s):
            last_sv = self.engine.lm.logits(prompts.clean_np[rows_s], prompts.clean_mask_np[rows_s])[:, -1]
        return _kl(self._clean_nv[rows_s], last_sv)

    @torch.no_grad()
    def _passes(self, circuits: Sequence[Tensor]) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        """For each pass, which circuit and pair its sequences are, and the logits at their last positions, [s, v]."""
        prompts = self.prompts
        cut_crw = torch.stack([self.graph.exists_rw & ~one.cpu() for one in circuits])
        places = [(c, n) for c in range(len(circuits)) for n in range(len(prompts))]
        for start in range(0, len(places), self.batch):
            part = places[start : start + self.batch]
            rows = torch.tensor([n for _, n in part], device=prompts.clean_np.device)
            cuts = cut_crw[[c for c, _ in part]]
            cut = cuts[0] if len({c for c, _ in part}) == 1 else cuts
            first = cuts.any(0).any(1).nonzero().flatten()[:1].tolist()
            corrupt_wspd = self._corrupt_wspd if first else self.engine.zero_writers()
            later = first and self.graph.block_of(first[0]) > 0 and self.engine.restarts
            clean = self._clean if later else None
            with self.engine.patched(corrupt_wspd, cut.to(self.engine.lm.dtype), rows_s=rows, clean=clean):
                logits_spv = self.engine.lm.logits(prompts.clean_np[rows], prompts.clean_mask_np[rows])
            last_sv = logits_spv[:, -1]
            yield part, last_sv if last_sv.dtype == torch.float64 else last_sv.float()


def _kl(clean_sv: Tensor, last_sv: Tensor) -> Tensor:
    """Σ p log(p / p of the circuit), of log-probabilities and logits."""
    return (clean_sv.exp() * (clean_sv - last_sv.to(clean_sv.dtype).log_softmax(-1))).sum(-1)


def exact_scores(patching: Patching, edges: Sequence[tuple[int, int]], bar: Progress | None = None) -> np.ndarray:
    """How much the metric of every pair rises when one edge alone is cut, for each edge (reader, writer), [edges, n].

    Edges are patched many in a pass, those of one block together, so that only that block and those after it are run.
    """
    graph, order = patching.graph, sorted(range(len(edges)), key=lambda at: edges[at])
    whole_n, found = patching(graph.exists_rw), np.zeros((len(edges), len(patching.prompts)))
    together = max(1, patching.batch // len(patching.prompts))
    for start in range(0, len(order), together):
        part = order[start : start + together]
        circuits = []
        for at in part:
            circuit_rw = graph.exists_rw.clone()
            circuit_rw[edges[at]] = False
            circuits.append(circuit_rw)
        found[part] = patching.metrics(circuits) - whole_n
        if bar is not None:
            bar.advance(len(part))
    return found


def acdc(patching: Patching, tau: float, bar: Progress | None = None) -> Found:
    """ACDC (Conmy et al. 2023): every edge from the logits backwards is cut permanently if that raises the KL by less than `tau` nats.

    Raises `InputError` for a `tau` that is not above 0.
    """
    graph = patching.graph
    return _taken_away(patching, graph.exists_rw, graph.exists_rw.nonzero().flip(0).tolist(), tau, bar)


def eliminate(patching: Patching, score_rw: Tensor, n: int, tau: float, bar: Progress | None = None) -> Found:
    """Of the `n` edges with the largest absolute scores, the weakest first: cut permanently if that raises the KL by less than `tau` nats.

    Raises `InputError` for a `tau` that is not above 0, and as `top_edges` does.
    """
    circuit_rw = top_edges(patching.graph, score_rw, n, absolute=True)
    order = sorted(circuit_rw.nonzero().tolist(), key=lambda edge: float(score_rw[tuple(edge)].abs()))
    return _taken_away(patching, circuit_rw, order, tau, bar)


def _taken_away(patching: Patching, circuit_rw: Tensor, order: list[list[int]], tau: float, bar: Progress | None) -> Found:
    """The result of trying one edge after the other, although a pass tries several cuts on top of one another.

    Edges after a refused one are tried again. Edges into a part that nothing reads any more are cut without a run.
    """
    if not tau > 0:
        raise InputError(f"expected tau above 0, the rise of the KL that one edge may cost, got {tau:g}")
    graph, circuit_rw = patching.graph, circuit_rw.clone()
    together, at, runs = max(1, patching.batch // len(patching.prompts)), 0, 1
    (kl,) = patching.kls([circuit_rw])
    while at < len(order):
        tried: list[tuple[int, Tensor]] = []
        begun, last_rw, end = at, circuit_rw, at
        while end < len(order) and len(tried) < together:
            r, w = order[end]
            end += 1
            if not last_rw[r, w]:
                continue
            last_rw = last_rw.clone()
            last_rw[r, w] = False
            if (fed := int(graph.fed_r[r])) >= 0 and not last_rw[:, fed].any():
                if tried:
                    tried[-1] = (end, last_rw)  # free on top of the one before
                else:
                    circuit_rw = last_rw
                continue
            tried.append((end, last_rw))
        kls = patching.kls([one_rw for _, one_rw in tried]) if tried else []
        runs, stop = runs + len(kls), end
        for (after, one_rw), new in zip(tried, kls):
            if new - kl < tau:
                circuit_rw, kl = one_rw, new
                continue
            stop = _behind_refused(order, circuit_rw, one_rw, after)
            break
        if bar is not None:
            bar.advance(stop - begun, edges=f"{int(circuit_rw.sum()):,}", KL=f"{kl:.3f}")
        at = stop
    kept_rw = graph.prune(circuit_rw)
    return Found(kept_rw, runs, patching.kls([kept_rw])[0])


def _behind_refused(order: list[list[int]], circuit_rw: Tensor, tried_rw: Tensor, after: int) -> int:
    """Where to continue: after the edge whose cut was refused, the first that differs."""
    return next(at for at, (r, w) in enumerate(order) if at < after and circuit_rw[r, w] and not tried_rw[r, w]) + 1
