"""A circuit of features and how good it is, as tables in the terminal."""

from typing import Any

from steering.circuits.features.controls import BASES
from steering.circuits.features.files import FeatureCircuit
from steering.circuits.finding.report import figure, interval

STRONGEST = 20
"""nodes and edges that are listed"""
COLUMNS = {
    "errors_in": "features, errors in",
    "errors_out": "errors out",
    "matched": "random features",
    **{name: name for name in BASES},
}


def print_tables(circuit: FeatureCircuit) -> None:
    from rich.console import Console

    console = Console()
    for table in tables(circuit):
        console.print(table)


def tables(circuit: FeatureCircuit) -> list[Any]:
    from rich.table import Table

    found, task = circuit.evaluation, circuit.task
    made = []
    if "completeness" in found:
        caption = "1 at a site of the stream: the scores account for all of the change; elsewhere the share that passes through the site"
        sums = Table("site", "features", "skip", "error", "all", title="scores over the metric's change, by site", caption=caption)
        for row in found["completeness"]:
            sums.add_row(
                row["site"] + ("" if row["residual"] else " *"), *(figure(row[key]) for key in ("features", "skip", "error", "all"))
            )
        made.append(sums)
    title = (
        f"{task['name']} in {circuit.model}: faithfulness (95 %) of the nodes of the highest scores, on {found['n_pairs']} held-out pairs"
    )
    curve = Table("nodes", *COLUMNS.values(), title=title, caption="random features: mean and highest of draws of features as frequent")
    for row in found["curve"]:
        curve.add_row(f"{row['nodes']:,}", *(cell(name, row[name]) for name in COLUMNS))
    made.append(curve)
    one = found["circuit"]
    measures = Table(
        "the circuit's measure", "", title=f"the circuit: {one['nodes']:,} nodes", caption="1 as the whole model, 0 as none of it"
    )
    for name, value in (
        ("faithfulness, errors in", interval(one["errors_in"])),
        ("faithfulness, errors out", interval(one["errors_out"])),
        ("the model with circuit and errors cut", interval(one["without"])),
        ("random features as frequent, errors in", cell("matched", one["matched"])),
    ):
        measures.add_row(name, value)
    made.append(measures)
    if found.get("steering"):
        one, others = found["steering"], found["steering"]["random"]
        title = (
            f"steering {one['pairs']} held-out corrupt prompts towards {', '.join(map(repr, one['answer']))} with the circuit, strength 1"
        )
        steering = Table("change of the metric", "", title=title)
        steering.add_row("clean minus corrupt", interval(one["clean_minus_corrupt"]))
        steering.add_row("steered minus corrupt", interval(one["steered_minus_corrupt"]))
        steering.add_row(f"{len(others)} random directions as long: lowest, highest", f"{figure(min(others))}, {figure(max(others))}")
        made.append(steering)
    if "stability" in found:
        stable = Table("nodes", "mean", "lowest", title="share of nodes that circuits of resampled pairs have in common (Jaccard)")
        for row in found["stability"]:
            stable.add_row(f"{row['nodes']:,}", figure(row["mean"]), figure(row["lowest"]))
        made.append(stable)
    caption = "score: what the node carries of the metric; clean and corrupt: mean of the largest value in the prompts"
    listed = Table("node", "score", "clean", "corrupt", "frequency", title="its strongest nodes", caption=caption)
    for row in circuit.nodes[:STRONGEST]:
        listed.add_row(row["node"], *(figure(row[key]) for key in ("score", "clean", "corrupt", "frequency")))  # type: ignore[literal-required]
    made.append(listed)
    if circuit.edges:
        edges = Table("edge", "score", title="its strongest edges", caption="score: what the later node carries because of the earlier one")
        for edge in circuit.edges[:STRONGEST]:
            edges.add_row(edge["edge"], figure(edge["score"]))
        made.append(edges)
    return made


def cell(name: str, value: dict[str, Any] | None) -> str:
    """Of one of `COLUMNS`."""
    if value is None:
        return "-"
    return f"{figure(value['mean'])}, {figure(value['highest'])}" if name == "matched" else interval(value)
