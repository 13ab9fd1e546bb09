"""The report: as JSON, and as tables."""

import json
import math
import sys
from typing import TYPE_CHECKING, Any

from sae.evaluation.check.search import Search
from sae.evaluation.check.trial import Trial
from sae.evaluation.check.verdict import Verdict, range_text

if TYPE_CHECKING:
    from sae.evaluation.check.check import CheckConfig

SHOWN = 8
"""alternatives in the table"""
MEASURES = {
    "l0": "L0 (features per token)",
    "fvu": "FVU (fraction of variance unexplained)",
    "random_fvu": "FVU of random directions at that L0",
    "norm_ratio": "norm of output / norm of its target",
    "cosine": "cosine of output and target",
    "loss_recovered": "loss recovered, against zeros",
    "silent_share": "features silent on this text",
}


def describe(config: "CheckConfig", search: Search, steps: list[Trial], measured: list[dict[str, Any]], verdict: Verdict) -> dict[str, Any]:
    declared, best, recorder = steps[0], steps[-1], search.sample.recorder
    made_with = declared.use.dictionary.metadata
    return {
        "dictionary": str(config.dictionary),
        "model": {"name": recorder.lm.name, "fingerprint": recorder.lm.fingerprint()},
        "made_with": {"name": made_with.get("model_name"), "fingerprint": made_with.get("model_fingerprint")},
        "site": declared.use.reads.site,
        "site_out": declared.use.writes.site,
        "bos": declared.use.reads.bos,
        "text": list(config.text) or "the package's own",
        "rows": measured[0]["rows"],
        "massive_rows": int(recorder.massive_n.sum()),
        "sequences": len(recorder.sequences),
        "verdict": verdict.word,
        "reasons": verdict.reasons,
        "declared": measured[0],
        "promised": [one._asdict() for one in search.promises],
        "found": None if best is declared else {**changes(best), **measured[-1]},
        "alternatives": [alternative(one, declared) for one in sorted(search.tried, key=lambda one: one.screened_fvu)],
    }


def changes(one: Trial) -> dict[str, Any]:
    return {"name": one.use.name, "changes": [{"kind": change.kind, "text": change.text} for change in one.use.changes]}


def alternative(one: Trial, declared: Trial) -> dict[str, Any]:
    """`fvu` is of all rows or, where `all_rows` is false, of every eighth."""
    low, high = one.minus(declared) if one.measured and one is not declared else (None, None)
    fvu, l0 = (one.fvu, one.l0) if one.measured else (one.screened_fvu, None)
    return {**changes(one), "fvu": fvu if math.isfinite(fvu) else None, "l0": l0, "all_rows": one.measured, "difference": [low, high]}


def show(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(measures_table(result))
    console.print(alternatives_table(result))
    place = result["site"] if result["site"] == result["site_out"] else f"{result['site']} to {result['site_out']}"
    console.print(
        f"{result['rows']:,} tokens at {place}, in {result['sequences']} sequences; {result['massive_rows']:,} massive rows left out."
    )
    console.print(f"Verdict: {result['verdict']}", *(f"- {reason}" for reason in result["reasons"]), sep="\n")
    if written := result.get("written"):
        console.print(
            f"Written to {written['folder']}: {written['why']}" if written["folder"] else f"Nothing was written: {written['why']}"
        )


def measures_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    found = result["found"]
    table = Table(
        "measure", "as declared", *(["as found"] if found else []), "promised", title=f"{result['dictionary']} on {result['model']['name']}"
    )
    promised = {one["measure"]: one for one in reversed(result["promised"])}
    for key, name in MEASURES.items():
        cells = [number(own[key]) for own in (result["declared"], found) if own]
        one = promised.get(key)
        table.add_row(name, *cells, f"{range_text(one['low'], one['high'])}, by {one['source']}" if one else "")
    return table


def alternatives_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("alternative", "FVU", "less the declared one's", title="Near alternatives, the best first")
    shown = [one for one in result["alternatives"] if one["changes"]]
    for one in shown[:SHOWN]:
        low, high = one["difference"]
        fvu = "undefined" if one["fvu"] is None else f"{one['fvu']:.3g}"
        table.add_row(one["name"], fvu if one["all_rows"] else f"about {fvu}", f"{low:.3g} to {high:.3g}" if one["all_rows"] else "")
    if len(shown) > SHOWN:
        table.add_row(f"{len(shown) - SHOWN} more, in the JSON report", "", "")
    return table


def number(value: dict[str, float] | float | None) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, dict):
        return "undefined" if value["value"] is None else f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
    return f"{value:.3g}"
