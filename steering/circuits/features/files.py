"""Circuits of features as files: JSON in its own format."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from sae.disk.reading import Count, Number, read_json
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from steering.circuits.features.passes import Nodes
from steering.circuits.features.sites import FeatureSite

FORMAT = "feature-circuit-1"


class DictionaryRow(TypedDict):
    """One of the dictionaries, in the order of the model."""

    source: str
    crc32: str
    reads: str
    writes: str
    d_sae: Count


class NodeRow(TypedDict):
    """A node of the circuit, the strongest first."""

    node: str
    score: Number
    clean: Number
    """of a feature: the mean over the pairs of the largest value in the clean prompt, in the model's units"""
    corrupt: Number
    weight: Number
    """of a feature: how strongly to steer with it, in the same units; 0 for other nodes"""
    frequency: Number
    """share of the pairs' tokens on which it is active"""


class EdgeRow(TypedDict):
    edge: str
    score: Number


class CircuitFile(TypedDict):
    format: str
    model: str
    fingerprint: str
    dictionaries: list[DictionaryRow]
    task: dict[str, Any]
    method: dict[str, Any]
    nodes: list[NodeRow]
    edges: list[EdgeRow]
    evaluation: dict[str, Any]
    scores: dict[str, Number]


@dataclass(frozen=True)
class FeatureCircuit:
    """Features of a model's dictionaries that do a task, and the scores of all nodes."""

    model: str
    fingerprint: str
    dictionaries: list[DictionaryRow]
    nodes: list[NodeRow]
    edges: list[EdgeRow] = field(default_factory=list)
    """between nodes of dictionaries that follow one another, "resid_pre.1/5->resid_post.2/17", the strongest first"""
    scores: dict[str, Number] = field(default_factory=dict)
    """of every node whose score is not 0, errors too"""
    task: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the JSON, atomically. Raises `InputError` for a place that cannot be written."""
        write_json(path, {"format": FORMAT, **vars(self)})

    def features(self, site: str) -> list[NodeRow]:
        """The features among its nodes at a site."""
        return [row for row in self.nodes if row["node"].partition("/")[0] == site and row["node"].partition("/")[2].isdigit()]

    def require_model(self, lm: LanguageModel) -> None:
        """Raises `InputError` for a model other than the circuit's."""
        if (found := lm.fingerprint()) != self.fingerprint:
            raise InputError(
                f"expected the model of the circuit, {self.model!r} with the fingerprint {self.fingerprint}, got {lm.name!r} with {found}; "
                "give that model, or find a circuit of this one"
            )

    def inside(self, sites: Sequence[FeatureSite]) -> Nodes:
        """The circuit's nodes as bool [n] for each site. Raises `InputError` for other dictionaries than the circuit's."""
        if [row_of(site) | {"source": ""} for site in sites] != [{**row, "source": ""} for row in self.dictionaries]:
            there = ", ".join(f"{row['source']} ({row['crc32']})" for row in self.dictionaries)
            got = ", ".join(f"{site.source} ({site.crc32})" for site in sites)
            raise InputError(f"expected the circuit's dictionaries, {there}, got {got}; give those, in the order of the model")
        found: dict[str, Tensor] = {site.writes: torch.zeros(site.n_nodes, dtype=torch.bool) for site in sites}
        by_name = {site.writes: site for site in sites}
        for row in self.nodes:
            place, _, kind = row["node"].partition("/")
            found[place][by_name[place].node(kind)] = True
        return list(found.values())


def row_of(site: FeatureSite) -> DictionaryRow:
    return {"source": site.source, "crc32": site.crc32, "reads": site.reads, "writes": site.writes, "d_sae": site.d_sae}


def open_feature_circuit(path: Path, lm: LanguageModel | None = None, sites: Sequence[FeatureSite] | None = None) -> FeatureCircuit:
    """A circuit from its JSON.

    Raises `InputError` for a file that is damaged, of another format or version, with nodes, edges or scores that its dictionaries lack,
    and for a model or dictionaries that it is not of, where they are given.
    """
    value: CircuitFile = read_json(path, "a circuit of features", CircuitFile)
    if value["format"] != FORMAT:
        raise InputError(f"expected a circuit of the format {FORMAT} at {path}, got {value['format']!r}; find it again with this version")
    circuit = FeatureCircuit(**{key: part for key, part in value.items() if key != "format"})  # type: ignore[arg-type]
    sizes = {row["writes"]: row["d_sae"] for row in circuit.dictionaries}
    ends = [end for row in circuit.edges for end in _ends(row["edge"], path)]
    for name in (*(row["node"] for row in circuit.nodes), *ends, *circuit.scores):
        place, _, kind = name.partition("/")
        if place not in sizes or not (kind in ("skip", "error") or (kind.isascii() and kind.isdigit() and int(kind) < sizes[place])):
            there = ", ".join(f"{site}/0 to {site}/{size - 1}" for site, size in sizes.items())
            raise InputError(f"expected nodes of the circuit's dictionaries in {path}, {there}, skip or error, got {name!r}; make it again")
    if lm is not None:
        circuit.require_model(lm)
    if sites is not None:
        circuit.inside(sites)
    return circuit


def _ends(edge: str, path: Path) -> list[str]:
    ends = edge.split("->")
    if len(ends) != 2:
        raise InputError(f'expected edges such as "resid_pre.1/5->resid_post.2/17" in {path}, got {edge!r}; make it again')
    return ends
