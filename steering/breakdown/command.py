"""The command that finds out why a too large coefficient breaks a model: strengths in every arm, as JSON, a report and tables."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes

from sae.disk.places import require_file
from sae.disk.writing import atomic, jsonable, write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sampling import Sampling
from sae.progress import progress
from sae.text_input import text_list
from steering.breakdown.arms import Arms, make_arms
from steering.breakdown.edges import SHOWN, damage_by_edge
from steering.breakdown.findings import SIGNS, crossings, predictions
from steering.breakdown.report import report_html
from steering.breakdown.sweep import WALL, Setup, make_setup, run_pass, sweep, sweep_passes, sweep_steps
from steering.named_direction import named_direction
from steering.strength.neutral import FEW_PROMPTS, MEASURED, OTHERS
from steering.vector import SteeringVector

FORMAT = "breakdown-1"


@dataclass(kw_only=True)
class BreakdownConfig:
    model: str
    """Model by hub name, folder or GGUF file."""
    vector: str
    """Direction of the residual stream: a vector file, the number of a feature of --dictionary, actadd:POSITIVE|NEGATIVE (two prompts),
    diffmean:CONCEPT (a shipped concept such as curse_words, or a concept's .json file), pca:N (component N of neutral text) or
    random:SEED."""
    dictionary: str | None = None
    """Folder, file or hub name of a dictionary of this model; if it reads at the site, its view of the stream is measured too."""
    site: str | None = None
    """Site, such as resid_post.2, for a direction that is not a file. Default: the dictionary's, else the middle block's resid_post."""
    strengths: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    """Lengths of the added vector, in units of the stream's typical norm at the site (rho), rising."""
    prompts: tuple[str, ...] = FEW_PROMPTS
    """Texts to continue at each strength."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    out: Path = Path("breakdown.json")
    """JSON file for every number and every continuation; the report, an HTML page, is written beside it."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    dry_run: bool = False
    """Print what would be done and about how long it would take, and stop."""


def diagnose_breakdown(config: BreakdownConfig) -> dict[str, Any]:
    """Writes the JSON and the report, prints the tables and returns what is in the JSON (of a dry run, nothing).

    Raises `InputError` for a direction that is not of the residual stream or zero, and for strengths that do not rise or start above the
    wall. Arms that the model or the site does not have are left out, with a line that says why.
    """
    started = time.monotonic()
    if not text_list(config.prompts, "prompts"):
        raise InputError("expected at least one prompt, got none")
    if not config.dry_run:
        if config.out.suffix == ".html":
            raise InputError(f"expected a name for the JSON file as --out, got {config.out}, which is the report's; end it in .json")
        require_file(config.out)
        require_file(config.out.with_suffix(".html"))
    lm = LanguageModel.load(config.model, device=config.device)
    vector, dictionary, feature = named_direction(lm, config.vector, config.dictionary, config.site)
    check_prompts(lm, vector, config.prompts)
    made = make_arms(lm, vector, config.sampling.seed)
    setup = make_setup(lm, vector, MEASURED, OTHERS, made.arms, dictionary, feature)
    announce(setup, made, config)
    if config.dry_run:
        return {}
    with progress("measuring", sweep_steps(len(made.arms), len(config.strengths)), "steps") as bar:
        found = sweep(setup, made.arms, config.strengths, config.prompts, config.sampling, bar.advance)
    found["damage_by_edge"] = _damage_by_edge(setup, found["walls"]["added"]["coefficient"])
    settings = asdict(config) | {"command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}", "seconds": round(time.monotonic() - started)}
    result = result_of(setup, made, found, settings)
    write_json(config.out, result)
    with atomic(config.out.with_suffix(".html")) as temporary:
        temporary.write_text(report_html(result), encoding="utf-8")
    print_tables(result)
    print(f"report: {config.out.with_suffix('.html')}")
    return result


def _damage_by_edge(setup: Setup, coefficient: float) -> dict[str, Any]:
    """The shares, or None with a printed reason."""
    try:
        return damage_by_edge(setup, coefficient)
    except InputError as reason:
        print(f"without the damage by edge: {reason}", file=sys.stderr)
        return {"left_out": str(reason)}


def result_of(setup: Setup, made: Arms, found: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The content of the JSON: a sweep with its settings, and the findings by rule."""
    result = jsonable(
        {
            "format": FORMAT,
            "model": setup.lm.name,
            "site": setup.vector.site,
            "vector": setup.vector.provenance,
            "feature": setup.feature,
            "wall": WALL,
            "left_out": made.left_out,
            "settings": settings,
            **found,
        }
    )
    return result | {"crossings": crossings(result), "predictions": [one._asdict() for one in predictions(result)]}


def check_prompts(lm: LanguageModel, vector: SteeringVector, prompts: Sequence[str]) -> None:
    """Prints how many prompts are shorter than the vector's directions per position. Raises `InputError` if all are."""
    lengths = lm.encode(prompts)[1].sum(1).tolist()  # host sync
    rows = max(len(direction) if direction.ndim == 2 else 0 for direction in vector.directions.values())
    if rows > max(lengths):
        raise InputError(
            f"expected a prompt of at least {rows} tokens, as many as the vector has directions, got one of {max(lengths)}; "
            "give a longer one as --prompts"
        )
    if short := sum(length < rows for length in lengths):
        print(f"{short} of {len(lengths)} prompts are shorter than the vector's {rows} positions: they get the first ones", file=sys.stderr)


def announce(setup: Setup, made: Arms, config: BreakdownConfig) -> None:
    for name, reason in made.left_out.items():
        print(f'the arm "{name}" is left out; the reason: {reason}', file=sys.stderr)
    begun = time.monotonic()
    run_pass(setup)
    seconds = (time.monotonic() - begun) * sweep_passes(len(made.arms), len(config.strengths))
    tokens = int(setup.mask_sp.sum())
    print(
        f"{len(made.arms)} arms at {len(config.strengths)} strengths at {setup.vector.site} of {config.model}, on {len(MEASURED)} texts of "
        f"{tokens:,} tokens; rho 1 is a coefficient of {1 / setup.rho_of_1:.4g}; about {max(1, round(seconds / 60))} min to {config.out}",
        file=sys.stderr,
    )


def print_tables(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    added = [row for row in result["rows"] if row["arm"] == "added"]
    title = f"added {result['where']} at {result['site']} of {result['model']}"
    caption = "slope: d log KL / d log c; text: continuations under the unsteered model"
    heads = ("rho", "KL", "slope", "entropy", "top-1 flips", "nats/token", "distinct-2")
    out = Table(*heads, title=title, caption=caption)
    for row, slope in zip(added, [None, *result["slopes"]["added"]]):
        logits, text = row.get("logits") or {}, row["text"]
        shown = [logits.get("kl"), slope, logits.get("steered_entropy"), logits.get("top1_flips"), text.get("nats_per_token")]
        out.add_row(f"{row['rho']:g}", *map(_figure, [*shown, text.get("distinct_2")]))
    console.print(out)
    first = result["first_norm"]
    title = f"inside: the stream right after the vector and after the last block; the output of {first or 'no norm'}; in brackets the null"
    heads = ("rho", "norm ratio", "last", "cos to v", "last", "token share", "eff. rank")
    inner = Table(*heads, title=title, caption="null: tokens without any structure")
    for row, null in zip(added, result["null"]):
        layers = row.get("inside", {}).get("layers", [])
        streams = [layers[at]["stream"].get("steered", {}) for at in (0, -1)] if layers else [{}, {}]
        ratios, cosines = ([_figure(stream.get(name)) for stream in streams] for name in ("norm_ratio", "cos_v"))
        kind, _, number = (first or "").partition(".")
        behind: dict[str, float | None] = next((layer[kind][1] for layer in layers if str(layer["layer"]) == number and kind in layer), {})
        blind = [f"{_figure(behind.get(name))} ({_figure(null[name])})" for name in ("token_share", "effective_rank")]
        inner.add_row(f"{row['rho']:g}", *ratios, f"{cosines[0]} ({_figure(null['cos_v'])})", cosines[1], *blind)
    console.print(inner)
    wall = result["walls"]["added"]
    title = (
        f'where each arm has a KL of {result["wall"]:g} nat, and the share of the damage of "added" at rho {wall["rho"]:.3g} it restores'
    )
    arms = Table("arm", "rho at the wall", "restored (95 %)", title=title, caption="restored: 1 all, 0 none, below 0 it breaks more")
    for name, own in result["walls"].items():
        share = result["restored"].get(name, {})
        restored = f"{_figure(share['value'])} ({_figure(share['low'])} to {_figure(share['high'])})" if share else ""
        arms.add_row(name, _figure(own["rho"]) if own["reached"] else f"not up to {own['rho']:.3g} (KL {_figure(own['kl'])})", restored)
    console.print(arms)
    carried = result["damage_by_edge"]
    if "writers" in carried:
        title = f'which parts carry the damage of "added" at rho {carried["rho"]:.3g}: shares of its KL'
        caption = (
            f"the shares of all writers add up to {_figure(carried['sum'])} (1: all of the KL); heads {_figure(carried['heads'])}, MLPs "
            f"{_figure(carried['mlps'])}; through: what it writes to any reader"
        )
        parts = Table("writer", "to the logits (95 %)", "through", title=title, caption=caption)
        for one in carried["writers"][:SHOWN]:
            interval = f"{_figure(one['value'])} ({_figure(one['low'])} to {_figure(one['high'])})"
            parts.add_row(one["writer"], interval, _figure(one["through"]))
        console.print(parts)
    limits = {sign.name: f"{'above' if sign.above else 'below'} {sign.limit:g}" for sign in SIGNS}
    signs = Table("sign", "limit", "rho", title=f"what crosses its limit first, added {result['where']}")
    for name, rho in result["crossings"].items():
        signs.add_row(name, limits[name], "not crossed" if rho is None else _figure(rho))
    console.print(signs)
    null = Table("prediction of the null model", "", "numbers", title="tokens without any structure, held against this direction")
    for one in result["predictions"]:
        verdict = "not decided" if one["held"] is None else "held" if one["held"] else "failed"
        null.add_row(one["prediction"], verdict, ", ".join(f"{name} {_figure(value)}" for name, value in one["numbers"].items()))
    console.print(null)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) >= 100 else f"{value:.2f}"
