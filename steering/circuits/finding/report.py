"""A circuit and how good it is, as tables in the terminal."""

from typing import Any

from steering.circuits.files import Circuit, some_cuts

STRONGEST = 15
"""number of edges that are listed"""


def print_tables(circuit: Circuit) -> None:
    from rich.console import Console
    from rich.table import Table

    console, found, task = Console(), circuit.evaluation, circuit.task
    title = f"{task['name']} in {circuit.model}: the highest scores by {circuit.method['scores']}, on {found['n_pairs']} held-out pairs"
    areas = f"CPR {interval(found['cpr'])} · CMD {interval(found['cmd'])} · CMD on log size {interval(found['cmd_log'])}"
    curve = Table("edges", "share", "on a path", "faithfulness (95 %)", "NDF", title=title, caption=areas)
    for row in [*found["counts"], *found["absolute"]]:
        share = f"{100 * row['fraction']:g} %" if "fraction" in row else "-"
        curve.add_row(f"{row['edges']:,}", share, f"{row['kept']:,}", interval(row["f"]), figure(row["ndf"]["value"]))
    console.print(curve)
    if "completeness" in found:
        shares = found["completeness"]
        caption = f"of {len(shares)} cuts, the lowest {figure(min(shares.values()))}, the highest {figure(max(shares.values()))}"
        sums = Table("cut", "scores / change", title="what the scores across a cut of the model account for: 1 all of it", caption=caption)
        for place in some_cuts(shares):
            sums.add_row(place, figure(shares[place]))
        console.print(sums)
    stable = Table("edges", "mean", "lowest", title="share of edges that circuits of resampled pairs have in common (Jaccard)")
    for row in found["stability"]:
        stable.add_row(f"{row['asked']:,}", figure(row["mean"]), figure(row["lowest"]))
    console.print(stable)
    one = found["circuit"]
    title = f"the circuit ({circuit.method['search']}): {one['n_edges']:,} of {circuit.graph.n_edges:,} edges"
    measures = Table("measure", "", title=title, caption="1 as the whole model, 0 as none of it")
    measures.add_row("faithfulness", interval(one["f"]))
    measures.add_row("the model with the circuit cut", interval(one["without"]))
    for name, key in (("random circuits of as many edges", "random"), ("circuits of random heads instead of its own", "random_heads")):
        measures.add_row(f"{len(one[key]['f'])} {name}, mean", figure(one[key]["mean"]))
        measures.add_row("the best of them", figure(one[key]["highest"]))
    console.print(measures)
    console.print(_strongest(circuit, Table))
    if "published" in found:
        console.print(_published(found["published"], Table))


def _published(found: dict[str, Any], table: Any) -> Any:
    caption = f"{found['heads_of_circuit']} of its heads write; as many random ones would be {found['by_chance']:.1f} of the published"
    rows = table("class", "published", "in the circuit", title="the 26 published heads of GPT-2 small", caption=caption)
    for name, row in found["classes"].items():
        rows.add_row(name, f"{len(row['heads'])}", ", ".join(head.removeprefix("head.") for head in row["found"]) or "-")
    rows.add_row("all", f"{found['published']}", f"{found['found']}")
    return rows


def _strongest(circuit: Circuit, table: Any) -> Any:
    from rich.markup import escape

    assert circuit.score_rw is not None
    caption, pieces = "score: what the edge carries of the metric", circuit.evaluation.get("pieces")
    by_piece = None if pieces is None else pieces["scores"]
    if by_piece is not None:
        caption += "; and what of it where each piece of the prompt stands, with one prompt's"
    elif pieces is not None:
        caption += f"; no scores by piece of the prompt, which {circuit.method['scores']} does not give"
    listed = table("edge", "score", title="its strongest edges", caption=caption)
    for text in pieces["example"] if pieces is not None and by_piece is not None else ():
        listed.add_column(escape(repr(text)))
    score_rw, inside = circuit.score_rw.cpu(), circuit.edges_rw.cpu().nonzero().tolist()
    for r, w in sorted(inside, key=lambda edge: -abs(float(score_rw[tuple(edge)])))[:STRONGEST]:
        name = circuit.graph.edge_name(r, w)
        listed.add_row(name, figure(float(score_rw[r, w])), *map(figure, by_piece[name] if by_piece is not None else ()))
    return listed


def interval(value: dict[str, float | None]) -> str:
    return f"{figure(value['value'])} ({figure(value['low'])} to {figure(value['high'])})"


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) >= 100 else f"{value:.2f}"
