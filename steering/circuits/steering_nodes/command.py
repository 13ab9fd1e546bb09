"""The command that steers at a circuit's nodes: a direction in the whole stream, in the circuit's heads, in random ones, at equal KL."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.disk.places import require_file
from sae.disk.writing import jsonable, write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import progress
from steering.circuits.files import Circuit, open_circuit
from steering.circuits.finding.command import CircuitConfig, prompts_of, rows_of_pass
from steering.circuits.model_graph.engine import Engine
from steering.circuits.steering_nodes.arms import (
    Arm,
    Measured,
    carriers,
    edge_arms,
    make_arms,
    mean_over,
    measure_arm,
    of_one_answer,
    random_edges,
    strongest_edges,
    task_direction,
    writers_change,
)
from steering.circuits.tasks.prompts import Prompts
from steering.directions.random import random_direction
from steering.directions.texts import activations_of_texts
from steering.named_direction import named_direction
from steering.strength.calibration import encode_cut, typical_norm
from steering.strength.neutral import MEASURED, OTHERS
from steering.vector import SteeringVector

FORMAT = "circuit-steering-1"
RANDOM, VALUES, EDGE, DIRECTION = "random heads", "values of random heads", "random edge", "random direction, whole stream"
DIRECTIONS = 5
"""random directions of the whole stream"""
STEPS = 6
"""number of steps of the path along which the effect is divided among readers"""


@dataclass(kw_only=True)
class SteerCircuitConfig:
    model: str
    """Model by hub name, folder or GGUF file."""
    circuit: Path
    """JSON file of a circuit that find-circuit wrote for this model; its task is measured."""
    vector: str | None = None
    """Direction: a file with one direction, the number of a feature of --dictionary, diffmean:CONCEPT, pca:N or random:SEED. Default: the
    task's own, the mean stream of clean prompts minus that of corrupt ones at their last token, over the pairs with the most frequent
    answers."""
    dictionary: str | None = None
    """Folder, file or hub name of a dictionary of this model, one of whose features --vector names."""
    site: str | None = None
    """Site of the residual stream; readers after it are steered. Default: the dictionary's, else resid_post a third of the way in."""
    budgets: tuple[float, ...] = (0.01, 0.1, 0.5)
    """KL on neutral text, in nats per token, at which arms are compared; rising."""
    edge: tuple[str, ...] = ()
    """Edges to steer alone, such as "head.0.1->q.2.3": the reader's input gets the writer's mean output on clean prompts minus that on
    corrupt ones. "vector->q.2.3" adds the direction itself."""
    edges: int = 0
    """Number of the circuit's strongest edges to steer alone, beside --draws random edges outside the circuit. Default: none."""
    draws: int = 20
    """Number of draws of random heads, in each layer as many as the circuit has."""
    examples: int = 256
    """Pairs of the task: one half for the direction; of the other half, those with the direction's answer are measured."""
    seed: int = 1
    """Seed of the pairs and of everything random. Pairs that the circuit was found on are always left out."""
    out: Path = Path("circuit-steering.json")
    """JSON file for every number."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    dry_run: bool = False
    """Print what would be done, and stop."""


def steer_circuit(config: SteerCircuitConfig) -> dict[str, Any]:
    """Writes the JSON, prints the tables and returns what is in it (of a dry run, nothing).

    Raises `InputError` for a circuit of another model or without heads after the site, a vector of another site, budgets that do not rise
    from above 0, and a task with too many different answers to make a direction.
    """
    started = time.monotonic()
    _check(config)
    lm = LanguageModel.load(config.model, device=config.device)
    circuit = open_circuit(config.circuit, lm)
    engine = Engine(lm)
    found_on, held_out = _others(config, circuit, lm).halves(config.seed)
    site = config.site or (None if config.dictionary else f"resid_post.{lm.n_layers // 3}")
    if config.vector:
        vector = named_direction(lm, config.vector, config.dictionary, site).vector
    else:
        assert site is not None  # a dictionary needs a vector
        vector = task_direction(engine, found_on, site)
    if vector.site != site and config.site is not None:
        raise InputError(f"expected a vector of {site}, got one of {vector.site}; leave out --site")
    site = vector.site
    answer = found_on.pairs[of_one_answer(found_on)[0]].right
    chosen = [number for number, pair in enumerate(held_out.pairs) if pair.right == answer]
    if not chosen:
        raise InputError(f"expected held-out pairs with the right answer {answer[0]!r}, got none; ask for more --examples")
    measured_on = held_out.subset(chosen)
    arms = make_arms(engine.graph, circuit.edges_rw, site, config.draws, np.random.default_rng(config.seed))
    arms += _edges(config, circuit, engine, found_on, site)
    unit_d = vector.unit().direction_d * typical_norm(torch.cat(activations_of_texts(lm, OTHERS, site)))  # so that coefficients are rho
    print(
        f"{len(arms)} arms after {site} of {config.model} at {len(config.budgets)} budgets, on {len(measured_on)} pairs with "
        f"the answer {answer[0]!r}; direction: {', '.join(f'{key} {value}' for key, value in vector.provenance.items())}",
        file=sys.stderr,
    )
    if config.dry_run:
        return {}
    neutral, found = encode_cut(lm, MEASURED), dict[str, list[Measured]]()
    with progress("steering", len(arms) + DIRECTIONS, "arms") as bar:
        for arm in arms:
            found[arm.name] = measure_arm(engine, arm, unit_d, measured_on, neutral, config.budgets)
            bar.advance(1, arm=arm.name)
        for number in range(DIRECTIONS):
            random_d = random_direction(len(unit_d), site, config.seed + number, float(unit_d.norm())).direction_d
            found[f"{DIRECTION} {number}"] = measure_arm(engine, arms[0], random_d, measured_on, neutral, config.budgets)
            bar.advance(1, arm=DIRECTION)
    settings = asdict(config) | {"command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}", "seconds": round(time.monotonic() - started)}
    rows = rows_of(arms, found, config.budgets)
    rho = next(row["rho"] for row in rows if row["arm"] == arms[0].name and row["budget"] == config.budgets[len(config.budgets) // 2])
    scaled = SteeringVector.at(site, unit_d, vector.provenance)
    result = jsonable(
        {
            "format": FORMAT,
            "model": lm.name,
            "fingerprint": lm.fingerprint(),
            "task": circuit.task.get("name"),
            "answer": list(answer),
            "pairs": len(measured_on),
            "site": site,
            "vector": vector.provenance,
            "settings": settings,
            "full_effect": _full_effect(engine, measured_on),
            "arms": rows,
            "carriers": carriers(engine, scaled, rho, measured_on, circuit.edges_rw, STEPS, config.draws),
        }
    )
    write_json(config.out, result)
    print_tables(result)
    print(f"numbers: {config.out}")
    return result


def _edges(config: SteerCircuitConfig, circuit: Circuit, engine: Engine, found_on: Prompts, site: str) -> list[Arm]:
    """Arms of single edges: the given ones, the circuit's strongest, and random ones."""
    if not config.edge and not config.edges:
        return []
    if config.edges and circuit.score_rw is None:
        raise InputError("expected a circuit with scores for its strongest edges, got one without; name them with --edge")
    graph, chosen = engine.graph, found_on.subset(of_one_answer(found_on))
    change_wd, rng = writers_change(engine, chosen, rows_of_pass(engine, chosen)), np.random.default_rng(config.seed)
    names, drawn = list(config.edge), list[str]()
    if config.edges and circuit.score_rw is not None:
        names += strongest_edges(graph, circuit.edges_rw, circuit.score_rw, change_wd, config.edges)
        drawn = random_edges(graph, circuit.edges_rw, change_wd, config.draws, rng)
    arms = edge_arms(graph, list(dict.fromkeys(names)), site, change_wd)
    return arms + [arm._replace(name=f"{EDGE} {at}") for at, arm in enumerate(edge_arms(graph, drawn, site, change_wd))]


def _others(config: SteerCircuitConfig, circuit: Circuit, lm: LanguageModel) -> Prompts:
    """Pairs that the circuit was not found on. Raises `InputError` if none is left."""
    asked = _task(config, circuit)
    prompts = prompts_of(asked, lm)
    settings = circuit.method["settings"]
    before, _ = prompts_of(replace(asked, examples=settings["examples"], seed=settings["seed"]), lm).halves(settings["seed"])
    known = {side for pair in before.pairs for side in (pair.clean, pair.corrupt)}
    left = [number for number, pair in enumerate(prompts.pairs) if pair.clean not in known and pair.corrupt not in known]
    if len(left) < 2:
        raise InputError(f"expected pairs that the circuit was not found on, got {len(left)} of {len(prompts)}; ask for more --examples")
    if len(left) < config.examples:
        print(
            f"{len(left)} pairs: {len(prompts)} different ones of {config.examples}, less those the circuit was found on", file=sys.stderr
        )
    return prompts.subset(left)


def rows_of(arms: Sequence[Arm], found: dict[str, list[Measured]], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """One for each arm and budget. Draws of random heads and random directions are one arm each, with the interval over draws and pairs;
    draws that do not reach the budget are left out, unless none does."""
    groups: dict[str, list[str]] = {}
    for name in found:
        group = next((group for group in (RANDOM, VALUES, EDGE, DIRECTION) if name.startswith(group)), name)
        groups.setdefault(group, []).append(name)
    readers = {arm.name: arm.places for arm in arms}
    rows = []
    for number, budget in enumerate(budgets):
        for group, names in groups.items():
            every = [found[name][number] for name in names]
            one = [measured for measured in every if measured.reached] or every  # equal KL is what makes arms comparable
            change_kn = np.stack([measured.change_n for measured in one])
            rows.append(
                {
                    "arm": group,
                    "budget": budget,
                    "readers": readers.get(names[0], readers[arms[0].name]),
                    "draws": len(names),
                    "rho": float(np.median([measured.coefficient for measured in one])),
                    "kl": float(np.mean([measured.kl for measured in one])),
                    "reached": sum(measured.reached for measured in every),
                    "change": mean_over(change_kn),
                    "of_draws": change_kn.mean(1).tolist(),
                }
            )
    return rows


def _full_effect(engine: Engine, prompts: Prompts) -> float:
    """Mean metric on the clean prompts minus that on the corrupt ones."""
    sides = ((prompts.clean_np, prompts.clean_mask_np), (prompts.corrupt_np, prompts.corrupt_mask_np))
    with torch.no_grad():
        clean, corrupt = (float(prompts.measure(engine.lm.logits(ids, mask)[:, -1]).mean()) for ids, mask in sides)
    return clean - corrupt


def _task(config: SteerCircuitConfig, circuit: Circuit) -> CircuitConfig:
    """The settings of find-circuit, with this command's number of pairs and seed."""
    settings = circuit.method.get("settings", {})
    if not (settings.get("task") or settings.get("pairs")):
        raise InputError(f"expected a circuit with its task, as find-circuit writes it, got {config.circuit} without; find it again")
    pairs = settings.get("pairs")
    return CircuitConfig(
        model=config.model,
        task=settings.get("task"),
        pairs=None if pairs is None else Path(pairs),
        corruption=settings.get("corruption"),
        examples=config.examples,
        seed=config.seed,
    )


def _check(config: SteerCircuitConfig) -> None:
    if (
        not config.budgets
        or not all(0 < budget < np.inf for budget in config.budgets)
        or list(config.budgets) != sorted(set(config.budgets))
    ):
        raise InputError(f"expected rising budgets above 0, got {', '.join(map(str, config.budgets)) or 'none'}")
    if config.dictionary is not None and config.vector is None:
        raise InputError("expected --vector with the number of a feature of --dictionary, got none; give one or leave the dictionary out")
    if config.edges < 0:
        raise InputError(f"expected a number of edges from 0 on, got {config.edges}")
    if config.draws < 2:
        raise InputError(f"expected at least 2 draws of random heads, got {config.draws}")
    if not config.dry_run:
        require_file(config.out)


def print_tables(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"{result['task']} in {result['model']}: change of the metric at equal KL (clean minus corrupt is {result['full_effect']:.2f})"
    table = Table(
        "readers that are steered",
        "of them",
        "KL",
        "rho",
        "change (95 %)",
        title=title,
        caption="at most: the budget is not reached; rho of draws: their median",
    )
    for row in result["arms"]:
        change = row["change"]
        missed = row["draws"] - row["reached"]
        kl = f"{row['kl']:.3f}" + (" at most" if missed == row["draws"] else f", {missed} draws left out" if missed else "")
        name = row["arm"] if row["draws"] == 1 else f"{row['arm']}, {row['draws']} draws"
        cells = f"{change['value']:.2f} ({change['low']:.2f} to {change['high']:.2f})"
        table.add_row(name, str(row["readers"]), kl, f"{row['rho']:.2f}", cells, end_section=row["arm"] == DIRECTION)
    console.print(table)
    carried = result["carriers"]
    title = "which readers of the vector carry its effect on the metric, at the middle budget"
    caption = f"shares add up to {carried['sum']:.2f}; 1 is all of the change"
    kinds = Table("readers", "share", title=title, caption=caption)
    for kind, share in carried["by_kind"].items():
        kinds.add_row(kind, f"{share:.2f}")
    kinds.add_row(f"those of the circuit ({carried['circuit_readers']} of {carried['readers']})", f"{carried['in_circuit']:.2f}")
    for name, key in (("as many random readers", "random_readers"), ("the circuit's with random heads for its own", "random_heads")):
        if drawn := carried[key]:
            kinds.add_row(f"{name}, {len(drawn)} draws", f"{np.mean(drawn):.2f} (highest {max(drawn):.2f})")
    console.print(kinds)
