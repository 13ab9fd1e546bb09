"""The command that finds a task's circuit: whether the model does the task, the score of every edge, the circuit, and its quality on
held-out pairs."""

import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sae.disk.places import require_file
from sae.disk.writing import jsonable
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import Progress, progress
from steering.circuits.files import Circuit, write_mib
from steering.circuits.finding.masks import STEPS as MASK_STEPS
from steering.circuits.finding.masks import learn_masks
from steering.circuits.finding.metrics import (
    COUNTS,
    bounds,
    evaluate_circuit,
    evaluate_scores,
    evaluation_runs,
    fraction_counts,
    minimality,
    stability,
    top_edges,
)
from steering.circuits.finding.published import compared_with_ioi, is_gpt2_small
from steering.circuits.finding.report import print_tables
from steering.circuits.finding.scores import STEPS, completeness, edge_scores
from steering.circuits.finding.searches import BATCH, Patching, acdc, eliminate, exact_scores
from steering.circuits.model_graph.engine import Engine
from steering.circuits.model_graph.graph import Graph
from steering.circuits.pages.page import write_page
from steering.circuits.tasks.generators import corruption_of, read_pairs
from steering.circuits.tasks.presence import presence, require_present, task_facts
from steering.circuits.tasks.prompts import Prompts, make_prompts, own_prompts

HELD = 1 << 30
"""limit in bytes for the writers' output that a pass may keep"""
SHORT_LIST = 0.2
"""of all edges, by score: what elimination starts with"""
WHOLE_PROMPTS = ("exact", "first-hop")
"""methods whose scores have no parts by position"""
LEAST = 4
"""minimum number of pairs, two of which to find the circuit on; with fewer, even if all are right, no interval is above a half"""
DRAWS = 20
"""random circuits of the circuit's size, and of random heads instead of its heads"""


@dataclass(kw_only=True)
class CircuitConfig:
    model: str
    """Model by hub name, folder or GGUF file."""
    task: str | None = None
    """Task: ioi, greater-than, agreement, agreement-attractor, pronoun, induction, docstring or fact; see docs/circuit_tasks.md."""
    pairs: Path | None = None
    """Instead of --task: a .jsonl file of pairs, each line with clean, corrupt, right and wrong."""
    corruption: str | None = None
    """How the corrupt prompts of --task are made. Default: the task's first way."""
    examples: int = 64
    """Pairs of --task: one half to find the circuit on, the other to measure it on."""
    method: Literal["ceap", "eap", "eap-ig", "clean-corrupted", "relp", "gim", "first-hop", "exact"] = "ceap"
    """How edges are scored. ceap (conductance, 5 steps), eap, eap-ig (5 steps), clean-corrupted, and relp and gim (rules for the backward
    pass) estimate; first-hop runs each reader on its changed input and estimates from there on; exact cuts each edge alone."""
    search: Literal["top", "eliminate", "acdc", "masks"] = "top"
    """How the circuit is found. top keeps the --edges with the largest scores; eliminate starts with a fifth of the graph by score and
    removes the weakest first; acdc starts with all edges and removes them from the logits backwards; masks learns a gate for every edge, in
    600 steps that start at the scores, and keeps the --edges whose gates are most open."""
    edges: int = 100
    """Number of edges that top and masks keep; those on no path are left out."""
    tau: float = 0.01
    """eliminate and acdc keep an edge cut if that raises the KL to the model's predictions by less than this, in nats."""
    minimality: bool = False
    """Also cut every edge of the circuit alone, one run for each."""
    seed: int = 0
    """Seed of the pairs, the halves, the intervals, the random circuits and the masks."""
    out: Path = Path("circuit.json")
    """JSON file for the circuit, the scores of all edges and every measure; the page that draws it has the same name with .html."""
    mib: Path | None = None
    """JSON file for the scores in the format of MIB's leaderboard. Default: not written."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    dry_run: bool = False
    """Print whether the model does the task, what would be done and about how long it would take, and stop."""


def find_circuit(config: CircuitConfig) -> Circuit | None:
    """Writes the JSON and the page, prints the tables and returns the circuit (of a dry run, None).

    Raises `InputError` for flags that do not go together, for a task that the model does not do, with the numbers, for pairs of different
    lengths, and for a model that the graph does not describe.
    """
    started = time.monotonic()
    _check(config)
    lm = LanguageModel.load(config.model, device=config.device)
    prompts = prompts_of(config, lm)
    there = presence(lm, prompts, config.seed)
    print(f"{prompts.task} ({prompts.corruption}): {prompts.summary()}\n{config.model}: {there.sentence()}", file=sys.stderr)
    require_present(there, prompts.task, config.model)
    engine, (found_on, held_out) = Engine(lm), prompts.halves(config.seed)
    if config.search in ("top", "masks"):
        top_edges(engine.graph, engine.graph.exists_rw.float(), config.edges, absolute=True)  # says so if there are not as many
    rows = rows_of_pass(engine, prompts)
    finding, measuring = Patching(engine, found_on, rows), Patching(engine, held_out, rows)
    if not engine.restarts and (config.method == "exact" or config.search == "acdc"):
        print(f"{config.model}: later blocks need the earlier ones, so every pass runs the whole model", file=sys.stderr)
    if config.dry_run:
        _announce(config, engine, measuring)
        return None
    score_nrw, piece_rwk = pair_scores(engine, found_on, config.method, rows, finding)
    score_rw = score_nrw.mean(0)
    edges_rw, found = searched(config, finding, score_rw)
    evaluation = measured(config, measuring, score_rw, edges_rw)
    if found_on.piece_np is not None:
        evaluation["pieces"] = pieces_of(engine.graph, found_on, edges_rw, piece_rwk)
    if config.method != "exact":
        change = found_change(engine, found_on, finding)
        evaluation["completeness"] = completeness(engine.graph, score_rw, change)
    sizes = [n for n in (*COUNTS, fraction_counts(engine.graph)[5]) if 0 < n <= engine.graph.n_edges]
    evaluation["stability"] = stability(
        lambda numbers: score_nrw[list(numbers)].mean(0), len(found_on), engine.graph, sorted(set(sizes)), seed=config.seed
    )
    if prompts.task == "ioi" and is_gpt2_small(lm):
        evaluation["published"] = compared_with_ioi(engine.graph, edges_rw)
    settings = asdict(config) | {"command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}", "seconds": round(time.monotonic() - started)}
    task = task_facts(prompts, found_on, held_out, there)
    method = {"scores": config.method, "steps": STEPS, "search": config.search, **found, "settings": settings}
    parts = (jsonable(part) for part in (task, method, evaluation))
    circuit = Circuit(config.model, lm.fingerprint(), engine.graph, edges_rw, score_rw, *parts)
    circuit.save(config.out)
    if config.mib is not None:
        write_mib(circuit, lm.d_model, config.mib)
    write_page(circuit, config.out.with_suffix(".html"))
    print_tables(circuit)
    print(f"circuit: {config.out}, its page: {config.out.with_suffix('.html')}" + (f", for MIB: {config.mib}" if config.mib else ""))
    return circuit


def prompts_of(config: CircuitConfig, lm: LanguageModel) -> Prompts:
    if config.pairs is not None:
        prompts = own_prompts(lm, read_pairs(config.pairs))
        if len(prompts) < LEAST:
            raise InputError(
                f"expected at least {LEAST} pairs in {config.pairs} that {config.model} can be run on, two to find the circuit on and two "
                f"to measure it on, got {prompts.summary()}; add pairs"
            )
        return prompts
    assert config.task is not None
    return make_prompts(lm, config.task, config.examples, config.seed, config.corruption)


def rows_of_pass(engine: Engine, prompts: Prompts) -> int:
    """Sequences of a pass, so that what their writers write, held a few times over, stays within `HELD`."""
    one = 3 * len(engine.graph.writers) * prompts.clean_np.shape[1] * engine.lm.d_model * torch.finfo(engine.lm.dtype).bits // 8
    return max(1, min(BATCH, HELD // one))


def pair_scores(engine: Engine, prompts: Prompts, method: str, rows: int, patching: Patching) -> tuple[Tensor, Tensor | None]:
    """How much the metric of every pair falls when an edge alone is cut, or the method's estimate of it, [n, r, w].

    And the mean over pairs by piece of the prompts, [r, w, k]; None where every prompt is one piece or the method has no such parts.
    """
    graph = engine.graph
    if method == "exact":
        edges = [(r, w) for r, w in graph.exists_rw.nonzero().tolist()]
        with progress("cutting every edge alone", len(edges), "edges") as bar:
            rise_en = exact_scores(patching, edges, bar)
        score_nrw = torch.zeros(len(prompts), *graph.exists_rw.shape)
        r_e, w_e = torch.tensor(edges).unbind(1)
        score_nrw[:, r_e, w_e] = -torch.from_numpy(rise_en.T).float()
        return score_nrw, None
    parts, by_piece = list[Tensor](), list[Tensor]()
    pieces = 0 if prompts.piece_np is None or method in WHOLE_PROMPTS else int(prompts.piece_np.max()) + 1
    with progress(f"scoring edges by {method}", len(prompts), "pairs") as bar:
        for start in range(0, len(prompts), rows):
            part = prompts.subset(range(start, min(start + rows, len(prompts))))
            metric = _of_last(part)
            spans = part.piece_np if pieces else None
            scores = edge_scores(engine, part.clean_np, part.corrupt_np, metric, part.clean_mask_np, method=method, spans_sp=spans)
            parts.append(-scores.score_srw.float().cpu())
            if scores.span_srwk is not None:
                total_rwk = -scores.span_srwk.float().cpu().sum(0)
                by_piece.append(torch.nn.functional.pad(total_rwk, (0, pieces - total_rwk.shape[-1])))  # where a part's prompts have fewer
            bar.advance(len(part))
    return torch.cat(parts), sum(by_piece[1:], start=by_piece[0]) / len(prompts) if by_piece else None


def pieces_of(graph: Graph, prompts: Prompts, circuit_rw: Tensor, piece_rwk: Tensor | None) -> dict[str, Any]:
    """The pieces of the prompt that has the most and, of each edge of the circuit, its score by piece; as it goes into JSON."""
    scores = None
    if piece_rwk is not None:
        scores = {graph.edge_name(r, w): piece_rwk[r, w].tolist() for r, w in circuit_rw.nonzero().tolist()}
    return {"example": list(max(prompts.pairs, key=lambda pair: len(pair.clean)).clean), "scores": scores}


def found_change(engine: Engine, prompts: Prompts, patching: Patching) -> float:
    """How much the mean metric falls when every edge is cut."""
    ends = [patching(circuit_rw).mean() for circuit_rw in (engine.graph.exists_rw, torch.zeros_like(engine.graph.exists_rw))]
    return float(ends[0] - ends[1])


def searched(config: CircuitConfig, patching: Patching, score_rw: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The circuit, and a description of the search."""
    graph = patching.graph
    if config.search == "top":
        return top_edges(graph, score_rw, config.edges, absolute=True), {"edges": config.edges}
    if config.search == "masks":
        with progress("learning masks", MASK_STEPS, "steps") as bar:
            learned = learn_masks(patching, score_rw, config.edges, steps=MASK_STEPS, seed=config.seed, bar=bar)
        said = {"edges": config.edges, "mask_steps": MASK_STEPS, "open_at_the_end": learned.expected, "kl": learned.kl}
        return learned.circuit_rw, said
    n = graph.n_edges if config.search == "acdc" else round(SHORT_LIST * graph.n_edges)
    with progress(f"taking edges away ({config.search})", n, "edges") as bar:
        found = acdc(patching, config.tau, bar) if config.search == "acdc" else eliminate(patching, score_rw, n, config.tau, bar)
    if not found.circuit_rw.any():
        raise InputError(f"expected a tau at which edges remain, got {config.tau:g}, which removes every edge; give a smaller one")
    return found.circuit_rw, {"tau": config.tau, "begun_with": n, "runs": found.runs, "kl": found.kl}


def measured(config: CircuitConfig, patching: Patching, score_rw: Tensor, edges_rw: Tensor) -> dict[str, Any]:
    """The curve of the scores, and the circuit among random ones, on the held-out pairs."""
    graph, single = patching.graph, int(edges_rw.sum()) if config.minimality else 0
    with progress("running circuits", measuring_runs(single), "circuits") as bar:
        evaluation = evaluate_scores(patching, graph, score_rw, config.seed, bar)
        run = _counted(patching, bar)
        ends = bounds(run, graph, config.seed)
        evaluation["circuit"] = evaluate_circuit(run, graph, edges_rw, ends, DRAWS, config.seed)
        if config.minimality:
            worth = minimality(run, graph, edges_rw, ends)
            evaluation["minimality"] = [{"edge": name, **value} for name, value in worth]
    return evaluation


def measuring_runs(single: int) -> int:
    return evaluation_runs() + 2 + 2 + 2 * DRAWS + (single + 1 if single else 0)


def _counted(patching: Patching, bar: Progress) -> Any:
    def run(circuit_rw: Tensor) -> np.ndarray:
        metric_n = patching(circuit_rw)
        bar.advance(1)
        return metric_n

    return run


def _of_last(prompts: Prompts) -> Any:
    return lambda logits_spv: prompts.measure(logits_spv[:, -1])


def check_task(config: CircuitConfig) -> None:
    """Raises `InputError` for flags about the pairs that do not go together."""
    if (config.task is None) == (config.pairs is None):
        raise InputError("expected either --task or --pairs, got both or neither; give one of them")
    if config.pairs is not None and config.corruption is not None:
        raise InputError("--corruption is for the package's tasks, got --pairs too; leave one of them out")
    if config.examples < LEAST:
        raise InputError(f"expected at least {LEAST} examples, two to find the circuit on and two to measure it on, got {config.examples}")
    if config.task is not None:
        corruption_of(config.task, config.corruption)


def check_places(config: CircuitConfig) -> None:
    """Raises `InputError` for places that cannot be written."""
    if config.out.suffix == ".html":
        raise InputError(f"expected a name for the JSON file as --out, got {config.out}, which is the page's; end it in .json")
    if not config.dry_run:
        if config.mib is not None:
            require_file(config.mib)
        require_file(config.out)
        require_file(config.out.with_suffix(".html"))


def _check(config: CircuitConfig) -> None:
    check_task(config)
    if not config.tau > 0:
        raise InputError(f"expected tau above 0, the rise of the KL that one edge may cost, got {config.tau:g}")
    if config.edges < 1:
        raise InputError(f"expected at least one edge, got {config.edges}")
    check_places(config)


def _announce(config: CircuitConfig, engine: Engine, patching: Patching) -> None:
    """How long it takes, by one run."""
    graph = engine.graph
    patching.kls([torch.zeros_like(graph.exists_rw)])  # what is kept for all runs
    begun = time.monotonic()
    patching(torch.zeros_like(graph.exists_rw))
    seconds = time.monotonic() - begun
    searching = {"top": 0, "eliminate": round(SHORT_LIST * graph.n_edges), "acdc": graph.n_edges, "masks": 3 * MASK_STEPS}[config.search]
    scoring = {"exact": graph.n_edges, "first-hop": len(graph.writers)}.get(config.method, 4 * STEPS)
    single = config.edges if config.minimality else 0
    minutes = seconds * (searching + scoring + measuring_runs(single)) / 60
    print(
        f"{graph.n_edges:,} edges of {config.model}; {searching:,} runs to find the circuit, {measuring_runs(single):,} to measure it; "
        f"about {max(1, round(minutes))} min to {config.out}",
        file=sys.stderr,
    )
