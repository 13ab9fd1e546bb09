"""Rewrite the table in docs/circuit_tasks.md: which model does which circuit task, with intervals."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sae.command_line import run
from sae.disk.writing import atomic
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import progress
from steering.circuits.tasks.generators import TASKS
from steering.circuits.tasks.presence import Presence, presence
from steering.circuits.tasks.prompts import make_prompts

PAGE = Path(__file__).resolve().parents[1] / "docs" / "circuit_tasks.md"
START, END = "<!-- tasks -->\n", "<!-- /tasks -->\n"


@dataclass
class TasksConfig:
    models: tuple[str, ...]
    """Models by hub name, folder or GGUF file, one column each."""
    names: tuple[str, ...]
    """Names of the columns, one for each model."""
    pairs: int = 128
    """Pairs of each task."""
    seed: int = 0
    """Seed of the pairs."""
    out: Path = PAGE
    """Page whose table is replaced."""


def write_page(config: TasksConfig) -> None:
    """Raises `InputError` if the numbers of models and names differ, and for a page without a place for the table."""
    if len(config.models) != len(config.names):
        raise InputError(f"expected a name for each model, got {len(config.models)} models and {len(config.names)} names; give as many")
    before, start, rest = (config.out.read_text(encoding="utf-8") if config.out.is_file() else "").partition(START)
    if not start or END not in rest:
        raise InputError(f"expected the lines {START.strip()} and {END.strip()} in {config.out}, found none; give the page as --out")
    found = [measured(model, config.pairs, config.seed) for model in config.models]
    with atomic(config.out) as temporary:
        temporary.write_text(before + START + table(config.names, found) + END + rest.partition(END)[2], encoding="utf-8")


def measured(model: str, n: int, seed: int) -> dict[tuple[str, str], Presence | None]:
    """The results for every task and corruption; None if the tokenizer allows no pair."""
    torch.set_num_threads(1)  # the numbers of a sum do not depend on the machine's cores
    lm = LanguageModel.load(model, device="cpu")
    rows = [(task, corruption) for task, row in TASKS.items() for corruption in row.corruptions]
    found: dict[tuple[str, str], Presence | None] = {}
    with progress(model, len(rows), "tasks") as bar:
        for task, corruption in rows:
            try:
                found[task, corruption] = presence(lm, make_prompts(lm, task, n, seed, corruption))
            except InputError:
                found[task, corruption] = None
            bar.advance(1)
    return found


def table(names: tuple[str, ...], found: list[dict[tuple[str, str], Presence | None]]) -> str:
    lines = [f"| task, corruption | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for task, corruption in found[0]:
        lines.append(f"| {task}, {corruption} | {' | '.join(cell(column[task, corruption]) for column in found)} |")
    return "\n".join(lines) + "\n"


def cell(found: Presence | None) -> str:
    if found is None:
        return "no pair fits"
    share, effect = ([row[key] for key in ("value", "low", "high")] for row in (found.accuracy, found.effect))
    text = "{:.0f} % ({:.0f}–{:.0f}); ".format(*(100 * part for part in share)) + "{:.2f} ({:.2f} to {:.2f})".format(*effect)
    text = text.replace("-", "−") + (f"; {found.n} pairs" if found.n < 128 else "")
    return f"**{text}**" if found.there else text


if __name__ == "__main__":
    run(write_page, TasksConfig, __doc__ or "")
