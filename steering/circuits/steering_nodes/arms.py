"""Steering only at some readers of a model: the same direction in the inputs of a circuit's heads, of others, or in the whole stream.

After the direction's site every part of the model reads the stream through a reader of the graph, so steering the whole stream there is
steering at all readers after it, and most arms are a subset of these.

n pairs · r readers · w writers · d width of the stream · v vocabulary
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.errors import InputError
from sae.statistics import Estimate, data_and_resamples, estimate
from steering.circuits.finding.metrics import of_random_heads
from steering.circuits.finding.scores import conductance
from steering.circuits.model_graph.engine import Engine
from steering.circuits.model_graph.graph import HEAD_INPUTS, Graph
from steering.circuits.tasks.prompts import Prompts
from steering.intervention import steered
from steering.strength.calibration import coefficient_for_kl, divergence, log_probs
from steering.vector import SteeringVector

LEAST_PAIRS = 4
"""minimum number of pairs with one answer for a task's own direction"""


class Arm(NamedTuple):
    name: str
    readers: tuple[int, ...] = ()
    """readers that get the stream plus the direction"""
    mlps: tuple[int, ...] = ()
    """layers whose MLP also writes the direction"""
    direction_d: Tensor | None = None
    """its own direction instead of the studied one; None: the studied one"""

    @property
    def places(self) -> int:
        return len(self.readers) + len(self.mlps)


class Measured(NamedTuple):
    """One arm at one budget."""

    coefficient: float
    kl: float
    """nats per token on neutral text"""
    reached: bool
    change_n: np.ndarray
    """of each pair's metric"""


@contextmanager
def steered_at(engine: Engine, readers: Collection[int], added_d: Tensor) -> Iterator[None]:
    """Inside, each of `readers` reads the stream plus `added_d` at every position, with its own norm and projection; all others keep
    every bit, but for those that `Engine.reading` names."""
    if readers:
        with engine.reading(readers, lambda chosen: added_d.to(engine.lm.device, engine.lm.dtype).expand(len(chosen), 1, 1, -1)):
            yield
    else:
        yield


@contextmanager
def steered_by(engine: Engine, arm: Arm, added_d: Tensor) -> Iterator[None]:
    """Inside, the arm's readers read the stream plus `added_d`, and its MLPs add it to what they write, at every position."""

    def more(written_spd: Tensor) -> Tensor:
        return written_spd + added_d.to(written_spd)

    with engine.lm.edited({f"mlp_out.{layer}": more for layer in arm.mlps}), steered_at(engine, arm.readers, added_d):
        yield


def make_arms(graph: Graph, circuit_rw: Tensor, site: str, draws: int, rng: np.random.Generator) -> list[Arm]:
    """All readers after the site; the circuit's heads, their queries, keys and values apart; the circuit's MLPs, at what they read and at
    what they write; as many random heads in each layer, `draws` times, whole and their values alone; the other heads; all MLPs. Arms
    without a place are left out.

    A head is in the circuit if an edge into its query, key or value is. Raises `InputError` for a circuit none of whose heads reads behind
    the site.
    """
    first = graph.first_behind(site)
    in_circuit = circuit_rw.cpu().any(1)
    heads: dict[int, list[int]] = {}  # layer -> the circuit's heads
    for layer in range(graph.n_layers):
        inputs = [graph.head_inputs(kind, layer) for kind in HEAD_INPUTS]
        if inputs[0].start >= first:
            heads[layer] = [head for head in range(graph.n_heads) if any(in_circuit[one.start + head] for one in inputs)]
    if not any(heads.values()):
        raise InputError(f"expected a circuit with heads after {site}, got one without; give an earlier site")

    def inputs_of(chosen: Mapping[int, Sequence[int]], kinds: Sequence[str] = HEAD_INPUTS) -> tuple[int, ...]:
        return tuple(graph.head_inputs(kind, layer).start + h for layer, some in chosen.items() for kind in kinds for h in some)

    mlps = [graph.mlp_in(layer) for layer in range(graph.n_layers) if graph.mlp_in(layer) >= first]
    others = {layer: [head for head in range(graph.n_heads) if head not in some] for layer, some in heads.items()}
    drawn = [{layer: rng.permutation(graph.n_heads)[: len(some)].tolist() for layer, some in heads.items()} for _ in range(draws)]
    arms = [
        Arm("whole stream", tuple(range(first, len(graph.readers)))),
        Arm("circuit's heads", inputs_of(heads)),
        *(Arm(f"circuit's heads, {name}", inputs_of(heads, kind)) for kind, name in (("q", "queries"), ("k", "keys"), ("v", "values"))),
        Arm("circuit's MLPs", own := tuple(mlp for mlp in mlps if in_circuit[mlp])),
        Arm("circuit's MLPs, outputs", mlps=tuple(layer for layer in range(graph.n_layers) if graph.mlp_in(layer) in own)),
        *(Arm(f"random heads {number}", inputs_of(some)) for number, some in enumerate(drawn)),
        *(Arm(f"values of random heads {number}", inputs_of(some, "v")) for number, some in enumerate(drawn)),
        Arm("other heads", inputs_of(others)),
        Arm("all heads", inputs_of({layer: range(graph.n_heads) for layer in heads})),
        Arm("all MLPs", tuple(mlps)),
    ]
    return [arm for arm in arms if arm.places]


VECTOR = "vector"
"""the writer of the direction itself, in the name of an edge"""


def edge_arms(graph: Graph, names: Sequence[str], site: str, change_wd: Tensor) -> list[Arm]:
    """An arm for each edge "head.0.1->q.2.3": its reader alone reads the stream plus what its writer changes, a row of `change_wd`.

    The edge "vector->q.2.3" carries the direction that is steered along. Raises `InputError` for an edge that the graph lacks, for a
    writer that changes nothing, and for a reader of the direction in front of the site.
    """
    arms = []
    for name in names:
        writer, _, reader = name.partition("->")
        if writer == VECTOR:
            if (r := graph.reader(reader)) < graph.first_behind(site):
                raise InputError(f"expected a reader after {site}, where the direction is, got {name}; give a later one")
            arms.append(Arm(f"edge {name}", (r,)))
            continue
        r, w = graph.edge(name)
        if not change_wd[w].any():
            raise InputError(f"expected an edge whose writer differs between clean and corrupt prompts, got {name}; give another")
        arms.append(Arm(f"edge {name}", (r,), direction_d=change_wd[w]))
    return arms


def strongest_edges(graph: Graph, circuit_rw: Tensor, score_rw: Tensor, change_wd: Tensor, count: int) -> list[str]:
    """Names of the circuit's edges of the largest absolute score whose writers change something."""
    edges = (circuit_rw.cpu() & change_wd.any(1).cpu()).nonzero().tolist()
    return [graph.edge_name(r, w) for r, w in sorted(edges, key=lambda edge: -abs(float(score_rw[tuple(edge)])))[:count]]


def random_edges(graph: Graph, circuit_rw: Tensor, change_wd: Tensor, draws: int, rng: np.random.Generator) -> list[str]:
    """Names of different edges outside the circuit whose writers change something."""
    edges = (graph.exists_rw & ~circuit_rw.cpu() & change_wd.any(1).cpu()).nonzero().tolist()
    return [graph.edge_name(*edges[at]) for at in rng.permutation(len(edges))[:draws]]


@torch.no_grad()
def writers_change(engine: Engine, prompts: Prompts, rows: int) -> Tensor:
    """The difference of each writer's output at the last token between clean and corrupt prompts, mean over pairs, [w, d].

    `rows` are sequences of a pass.
    """
    total_wd = torch.zeros(len(engine.graph.writers), engine.lm.d_model, dtype=torch.float64)
    for sign, ids_np, mask_np in ((1, prompts.clean_np, prompts.clean_mask_np), (-1, prompts.corrupt_np, prompts.corrupt_mask_np)):
        for ids_sp, mask_sp in zip(ids_np.split(rows), mask_np.split(rows)):
            total_wd += sign * engine.writers(ids_sp, mask_sp)[:, :, -1].double().sum(1).cpu()
    return (total_wd / len(prompts)).float()


def of_one_answer(prompts: Prompts) -> list[int]:
    """The pairs with the most frequent right answers, so that one direction can lead to them."""
    answers = [pair.right for pair in prompts.pairs]
    most = max(dict.fromkeys(answers), key=answers.count)
    return [number for number, right in enumerate(answers) if right == most]


def task_direction(engine: Engine, prompts: Prompts, site: str) -> SteeringVector:
    """Mean stream at the last token of the clean prompts minus that of the corrupt ones, over the pairs with the most frequent answer.

    Raises `InputError` for fewer than `LEAST_PAIRS` of them: over all answers the differences of a symmetric task cancel.
    """
    chosen = of_one_answer(prompts)
    if len(chosen) < LEAST_PAIRS:
        raise InputError(
            f"expected at least {LEAST_PAIRS} pairs with the same right answer to make a direction of, got {len(chosen)}; give --vector"
        )
    part = prompts.subset(chosen)
    sides = ((part.clean_np, part.clean_mask_np), (part.corrupt_np, part.corrupt_mask_np))
    clean_d, corrupt_d = (engine.lm.record(ids_np, [site], mask_np)[site][:, -1].float().mean(0) for ids_np, mask_np in sides)
    facts = {"method": "clean - corrupt", "task": prompts.task, "answer": ", ".join(part.pairs[0].right), "pairs": len(chosen)}
    return SteeringVector.at(site, clean_d - corrupt_d, facts)


@torch.no_grad()
def measure_arm(
    engine: Engine, arm: Arm, direction_d: Tensor, prompts: Prompts, neutral: tuple[Tensor, Tensor], budgets: Sequence[float]
) -> list[Measured]:
    """What steering the corrupt prompts does to the task's metric, at each off-task KL, in the order of `budgets`.

    An arm's own direction is taken at the length of `direction_d`.
    """
    if arm.direction_d is not None:
        direction_d = arm.direction_d / arm.direction_d.norm() * direction_d.norm()
    lm, (ids_sp, mask_sp) = engine.lm, neutral
    unsteered_nv, before_n = log_probs(lm, ids_sp, mask_sp), _metric(engine, prompts)

    def kl_at(coefficient: float) -> float:
        with steered_by(engine, arm, coefficient * direction_d):
            return divergence(unsteered_nv, log_probs(lm, ids_sp, mask_sp)).kl

    found, start = [], 0.3
    for budget in budgets:
        search = coefficient_for_kl(kl_at, budget, start=start, most=1000.0)
        start = search.coefficient
        with steered_by(engine, arm, search.coefficient * direction_d):
            change_n = _metric(engine, prompts) - before_n
        found.append(Measured(search.coefficient, search.kl, search.reached, change_n))
    return found


def _metric(engine: Engine, prompts: Prompts) -> np.ndarray:
    """Of the corrupt prompts, [n] float64."""
    logits_spv = engine.lm.logits(prompts.corrupt_np, prompts.corrupt_mask_np)
    return prompts.measure(logits_spv[:, -1]).double().cpu().numpy()  # host sync


def mean_over(change_kn: np.ndarray) -> Estimate:
    """The mean of some draws' changes [draws, n], with the interval over draws and pairs, which are drawn apart."""
    rng = np.random.default_rng(0)
    of_draw_rk, of_pair_rn = (data_and_resamples(size, rng) for size in change_kn.shape)
    return estimate(np.einsum("rk,kn,rn->r", of_draw_rk, change_kn, of_pair_rn) / (of_draw_rk.sum(1) * of_pair_rn.sum(1)))


def carriers(
    engine: Engine, vector: SteeringVector, coefficient: float, prompts: Prompts, circuit_rw: Tensor, steps: int, draws: int = 20
) -> dict[str, Any]:
    """Which readers carry what steering the corrupt prompts does to the metric: conductance along the coefficient, as plain values.

    The change that enters at a reader is what the vector and all that follows from it write there. "vector" is the share of the metric's
    change that each reader of the vector itself takes in; "in_circuit" is what the circuit's readers take in of it, "random_readers" as
    many random ones, and "random_heads" the circuit's with random heads of the same layers instead of its own, `draws` times each.
    """
    site = vector.site
    scores = conductance(
        engine,
        prompts.corrupt_np,
        prompts.corrupt_mask_np,
        lambda share: steered(engine.lm, [(vector, share * coefficient)]),
        lambda logits_spv: prompts.measure(logits_spv[:, -1]),
        steps,
        site,
    )
    graph, change = engine.graph, float((scores.corrupt_s - scores.clean_s).double().mean())
    if not abs(change) > 0:
        raise InputError(f"expected a coefficient that changes the task's metric, got {coefficient:g}; take a larger one")
    share_rw = scores.score_srw.double().mean(0).cpu() / change
    first, own_r = graph.first_behind(site), share_rw[:, 0]
    in_circuit_r = circuit_rw.cpu().any(1)
    across = [float(share_rw[cut_rw].sum()) for cut_rw in graph.cuts().values() if not cut_rw[:first].any()]
    behind = torch.arange(len(own_r)) >= first
    rng, size = np.random.default_rng(0), int((in_circuit_r & behind).sum())
    random_readers = [rng.permutation(int(behind.sum()))[:size] for _ in range(draws)]
    return {
        "change": change,
        "least_across": min(across),
        "most_across": max(across),
        "sum": float(own_r.sum()),
        "by_kind": {
            kind: float(own_r[[name.startswith(prefix) for name in graph.readers]].sum())
            for kind, prefix in (("queries", "q."), ("keys", "k."), ("values", "v."), ("MLPs", "mlp_in."), ("logits", "logits"))
        },
        "in_circuit": float(own_r[in_circuit_r].sum()),
        "random_readers": [float(own_r[first:][torch.from_numpy(some)].sum()) for some in random_readers],
        "random_heads": [float(own_r[one_rw.any(1)].sum()) for one_rw in of_random_heads(graph, circuit_rw, draws)],
        "circuit_readers": size,
        "readers": int(behind.sum()),
        "vector": [{"reader": graph.readers[r], "share": float(own_r[r])} for r in own_r.abs().topk(min(15, int(behind.sum()))).indices],
    }
