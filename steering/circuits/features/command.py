"""The command that finds circuits: of edges between a model's parts, or with --features of features of dictionaries."""

import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sae.disk.places import require_file
from sae.disk.writing import jsonable
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import progress
from steering.circuits.features.controls import BASES, frequencies, other_bases
from steering.circuits.features.curves import COUNTS, DRAWS, Curve, evaluate_features, stability, top_nodes
from steering.circuits.features.edges import edge_scores, passes_of, rows_of_edges
from steering.circuits.features.files import FeatureCircuit, row_of
from steering.circuits.features.masks import ROUNDS, learned_masks
from steering.circuits.features.page import known_of, write_page
from steering.circuits.features.passes import NodePatching, Nodes, require_aligned
from steering.circuits.features.report import print_tables
from steering.circuits.features.scores import STEPS, completeness, node_scores
from steering.circuits.features.sites import FeatureSite, open_sites
from steering.circuits.features.weights import circuit_vector, node_rows, steering_effect
from steering.circuits.files import Circuit
from steering.circuits.finding.command import CircuitConfig, check_places, check_task, find_circuit, prompts_of
from steering.circuits.tasks.presence import presence, require_present, task_facts
from steering.circuits.tasks.prompts import Prompts

MOST_EDGES = 500
"""number of the strongest edges that are kept"""
OF_BOTH = {"model", "task", "pairs", "corruption", "examples", "seed", "out", "device", "dry_run", "features"}
"""flags of circuits of edges and of features"""


@dataclass(kw_only=True)
class FindCircuitConfig(CircuitConfig):
    features: tuple[str, ...] = ()
    """Dictionaries of the model, by folder, file or hub name, each at its own site: the circuit then consists of their features instead of
    edges between the model's parts."""
    node_method: Literal["ceap", "grad", "ig", "mask"] = "ceap"
    """With --features, how nodes are scored: ceap (conductance, 5 steps), grad or ig (5 steps); mask learns gates on all nodes."""
    nodes: int = 30
    """With --features, number of nodes of the circuit: those with the largest scores."""
    penalty: float = 0.01
    """With --node-method mask: nats of KL that one more node has to save."""
    outside: Literal["corrupt", "mean"] = "corrupt"
    """With --features, the values of nodes outside a circuit: those of the corrupt prompt, or means over the tokens of the pairs that the
    circuit is found on."""
    index: tuple[Path, ...] = ()
    """With --features, feature indexes of the dictionaries: the page then says what each feature fires on and links to `sae browse`."""
    export: tuple[Path, ...] = ()
    """With --features, folders of `sae export --format static`, one for each dictionary in the model's order, to which the page links."""


def find(config: FindCircuitConfig) -> Circuit | FeatureCircuit | None:
    """Runs one of the two commands. Raises `InputError` for flags of the other one too."""
    given = {one.name for one in fields(config) if getattr(config, one.name) != one.default}
    of_edges = {one.name for one in fields(CircuitConfig)}
    if wrong := sorted((given - OF_BOTH) & of_edges if config.features else given - OF_BOTH - of_edges):
        flag = "--" + wrong[0].replace("_", "-")
        raise InputError(
            f"{flag} is for circuits of {'edges, got --features too' if config.features else 'features'}; leave {flag} out"
            + ("" if config.features else ", or give --features")
        )
    if not config.features:
        return find_circuit(CircuitConfig(**{one.name: getattr(config, one.name) for one in fields(CircuitConfig)}))
    return find_feature_circuit(config)


def find_feature_circuit(config: FindCircuitConfig) -> FeatureCircuit | None:
    """Writes the JSON, the page and the steering vector beside it, prints the tables and returns the circuit (of a dry run, None).

    Raises `InputError` for flags that do not go together, for dictionaries of another model or that cannot be used together, for a task
    that the model does not do, with the numbers, and for pairs of different lengths.
    """
    started = time.monotonic()
    _check(config)
    lm = LanguageModel.load(config.model, device=config.device)
    sites = open_sites(lm, config.features)
    known = known_of(sites, config.index, config.export)
    prompts = prompts_of(config, lm)
    require_aligned(prompts)
    there = presence(lm, prompts, config.seed)
    print(f"{prompts.task} ({prompts.corruption}): {prompts.summary()}\n{config.model}: {there.sentence()}", file=sys.stderr)
    require_present(there, prompts.task, config.model)
    found_on, held_out = prompts.halves(config.seed)
    if config.dry_run:
        _announce(config, lm, sites, held_out)
        return None
    score_sn, sums = _scored(config, lm, sites, found_on, "nodes")
    score_n = [one_sn.mean(0) for one_sn in score_sn]
    inside = top_nodes(sites, score_n, config.nodes, errors=False)
    if not any(one_n.any() for one_n in inside):
        raise InputError("expected features that differ between the prompts' sides, got none; give dictionaries of other sites")
    frequency = frequencies(lm, sites, found_on)
    evaluation = _measured(config, lm, sites, found_on, held_out, score_n, inside, frequency)
    if sums:
        evaluation["completeness"] = sums
        counts = [count for count in COUNTS if count <= sum(int((one_n != 0).sum()) for one_n in score_n)]
        evaluation["stability"] = stability(sites, score_sn, counts, seed=config.seed)
    edges = []
    if len(sites) > 1:
        method = "ceap" if config.node_method == "mask" else config.node_method
        with progress("scoring edges", passes_of(sites, found_on, inside, method, STEPS), "nodes") as bar:
            edges = rows_of_edges(edge_scores(lm, sites, found_on, inside, method, STEPS, bar), MOST_EDGES)
    settings = asdict(config) | {"command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}", "seconds": round(time.monotonic() - started)}
    task = task_facts(prompts, found_on, held_out, there)
    rows, answer = node_rows(lm, sites, found_on, score_n, inside, frequency)
    vector = circuit_vector(lm, sites, rows, answer)
    evaluation["steering"] = steering_effect(lm, vector, held_out, answer, config.seed) if vector else None
    method_of = {"scores": config.node_method, "steps": STEPS, "steering": {"answer": answer}, "settings": settings}
    scores = {site.name(node): float(one_n[node]) for site, one_n in zip(sites, score_n) for node in one_n.nonzero()[:, 0].tolist()}
    parts = (jsonable(part) for part in (task, method_of, evaluation))
    circuit = FeatureCircuit(config.model, lm.fingerprint(), [row_of(site) for site in sites], rows, edges, scores, *parts)
    circuit.save(config.out)
    vector_path, page = (config.out.with_suffix(ending) for ending in (".safetensors", ".html"))
    if vector is not None:
        vector.save(vector_path)
    write_page(circuit, known, vector_path, page)
    print_tables(circuit)
    print(f"circuit: {config.out}, its page: {page}" + (f", to steer with: {vector_path}" if vector else "; no feature to steer with"))
    return circuit


def _scored(
    config: FindCircuitConfig, lm: LanguageModel, sites: list[FeatureSite], prompts: Prompts, what: str
) -> tuple[Nodes, list[dict[str, Any]]]:
    """For each site, scores of every pair [s, n] (for masks, which belong to all pairs, one row), and the completeness of the sites."""
    if config.node_method == "mask":
        with progress(f"learning gates of {what}", ROUNDS, "rounds") as bar:
            masks = learned_masks(lm, sites, prompts, config.penalty, mean_of=mean_of(config, prompts), seed=config.seed, bar=bar)
        return [one_n[None] for one_n in masks], []
    with progress(f"scoring {what} by {config.node_method}", len(prompts), "pairs") as bar:
        scores = node_scores(lm, sites, prompts, config.node_method, STEPS, bar)
    return scores.score_sn, completeness(sites, scores)


def _measured(
    config: FindCircuitConfig,
    lm: LanguageModel,
    sites: list[FeatureSite],
    found_on: Prompts,
    held_out: Prompts,
    score_n: Nodes,
    inside: Nodes,
    frequency: list[Tensor],
) -> dict[str, Any]:
    """The curves of all bases and the circuit among random features, on the held-out pairs."""
    scored = {"features": (sites, score_n)}
    for name, others in other_bases(lm, sites, found_on, config.seed).items():
        score_sn, _ = _scored(config, lm, others, found_on, name)
        scored[name] = (others, [one_sn.mean(0) for one_sn in score_sn])
    with progress("running circuits", measuring_runs(), "circuits") as bar:
        means = mean_of(config, found_on)
        curves = {name: Curve(NodePatching(lm, ones, held_out, means), scores, bar) for name, (ones, scores) in scored.items()}
        own = curves.pop("features")
        return evaluate_features(own, curves, frequency, inside, config.seed)


def mean_of(config: FindCircuitConfig, found_on: Prompts) -> Prompts | None:
    """The pairs whose means are the values outside, if means are used."""
    return found_on if config.outside == "mean" else None


def measuring_runs() -> int:
    """Maximum number of runs: two for each number of nodes, the random features and the other bases; the circuit's own."""
    return (len(COUNTS) + 2) * (2 + DRAWS + len(BASES)) + 3 + DRAWS


def _announce(config: FindCircuitConfig, lm: LanguageModel, sites: list[FeatureSite], prompts: Prompts) -> None:
    """Prints how long it takes, from one run."""
    patching = NodePatching(lm, sites, prompts)
    begun = time.monotonic()
    patching([torch.zeros(site.n_nodes, dtype=torch.bool) for site in sites])
    seconds = time.monotonic() - begun
    scoring = (1 + len(BASES)) * 2 * (ROUNDS if config.node_method == "mask" else 2 * STEPS)
    behind = 2 * STEPS * (config.nodes + 2 * len(sites)) if len(sites) > 1 else 0
    minutes = seconds * (scoring + measuring_runs() + behind) / 60
    there = ", ".join(f"{site.d_sae:,} features at {site.writes}" for site in sites)
    print(f"{there}; {measuring_runs():,} runs to measure; about {max(1, round(minutes))} min to {config.out}", file=sys.stderr)


def _check(config: FindCircuitConfig) -> None:
    check_task(config)
    if config.nodes < 1:
        raise InputError(f"expected at least one node, got {config.nodes}")
    if config.node_method != "mask" and config.penalty != FindCircuitConfig.penalty:
        raise InputError(f"--penalty is for --node-method mask, got {config.node_method}; leave --penalty out")
    if not config.penalty > 0:
        raise InputError(f"expected a penalty above 0, in nats for each node, got {config.penalty:g}")
    check_places(config)
    if not config.dry_run:
        require_file(config.out.with_suffix(".safetensors"))
