"""Write docs/model_families.md: which sites exist in which families of language models, and why others do not.

A tiny random model of each family of transformers is built and inspected, in its own process with limits on time and memory.
"""

import contextlib
import multiprocessing
import os
import resource
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_models import families, left_out, text_family, tiny_model

from sae.command_line import run
from sae.disk.writing import atomic
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sites import EMBED, KINDS, parse_site

SECONDS, BYTES = 60, 8 << 30  # of one family
PAGE = Path(__file__).resolve().parents[1] / "docs" / "model_families.md"
COLUMNS = [  # kinds that are there together
    *([EMBED], ["resid_pre", "resid_post"], ["attn_in"], ["q"], ["k", "v"], ["head_out"], ["attn_out"], ["resid_mid"]),
    *(["mlp_in_nogain"], ["mlp_in"], ["mlp_act"], ["mlp_out"]),
]


@dataclass
class FamiliesConfig:
    families: tuple[str, ...] = ()
    """Families to look at, by `model_type`. Default: all."""
    out: Path = PAGE
    """Page to write."""


class Result(NamedTuple):
    """The result of one family."""

    n_layers: int
    n_there: dict[str, int]
    """how many blocks have it, by kind of site"""
    reasons: dict[str, list[str]]
    """why blocks have it not, by kind of site"""
    wrong: list[str]
    """sites that are found and are not what they should be"""
    is_sum: bool
    """resid_post is resid_pre + attn_out + mlp_out in every block that has them"""


def look_at(family: str) -> Result:
    lm = LanguageModel(tiny_model(family), name=family)
    n_there, reasons = dict.fromkeys((EMBED, *KINDS), 0), {kind: list[str]() for kind in (EMBED, *KINDS)}
    for site in lm.sites():
        n_there[parse_site(site).kind] += 1
    for site, reason in lm.refused_sites().items():
        known = reasons[parse_site(site).kind]
        known += [] if reason in known else [reason]
    ids_sp = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    values = lm.record(ids_sp, lm.sites())
    return Result(lm.n_layers, n_there, reasons, wrong_sites(lm, ids_sp, values), is_sum(lm.n_layers, values))


def wrong_sites(lm: LanguageModel, ids_sp: torch.Tensor, values: dict[str, torch.Tensor]) -> list[str]:
    """The sites where a change is not recorded or has no effect, or where no change has an effect."""
    plain, wrong = lm.logits(ids_sp), []
    for site, value in values.items():
        with lm.edited({site: torch.clone}):
            same = torch.equal(lm.logits(ids_sp), plain)
        new = value + value.pow(2).mean().sqrt() * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
        with lm.edited({site: partial(_put, new)}):
            seen = torch.allclose(lm.record(ids_sp, [site])[site], new, rtol=1e-4, atol=1e-4)
            changed = not torch.equal(lm.logits(ids_sp), plain)
        wrong += [] if same and seen and changed else [site]
    return wrong


def _put(new: torch.Tensor, _value: torch.Tensor) -> torch.Tensor:
    return new


def is_sum(n_layers: int, values: dict[str, torch.Tensor]) -> bool:
    for layer in range(n_layers):
        parts = [values[site] for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post") if (site := f"{kind}.{layer}") in values]
        if len(parts) == 4:
            pre, attention, mlp, post = parts
            if not torch.allclose(pre + attention + mlp, post, rtol=1e-4, atol=1e-4):
                return False
    return True


def apart(family: str) -> Result | str:
    """Runs `look_at` in its own process; returns the reason if that fails."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(family, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(SECONDS) else f"took longer than {SECONDS} seconds"
    except EOFError:
        answer = "its process ended without an answer"
    process.kill()
    process.join()
    return answer


def _child(family: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            answer: Result | str = look_at(family)
        except InputError as error:
            answer = str(error)
        except Exception as error:  # a family's own code may fail in any way
            answer = " ".join(f"{type(error).__name__}: {error}".split())[:200].strip()
    pipe.send(answer)


INTRODUCTION = """# Which families of models have which sites

`python scripts/model_families.py` made this page with transformers {version}. It built a tiny random model of each family of decoder-only
text models from the family's configuration class. It searched for [the sites](language_models.md#how-sites-are-found), then recorded
each site that was found, replaced its values and put them back. Sites are searched again in every model that is loaded, so a model whose
configuration differs may have others; `lm.refused_sites()` gives its reasons.

"yes": in all blocks. "some": in some blocks only. "–": in none. The numbers after them refer to the reasons below the table.

"""
FURTHER = "\\+ The block changes the stream after the MLP, too, so that resid_post is not resid_pre + attn_out + mlp_out."


def page(results: dict[str, Result | str], same_text: dict[str, list[str]], others: dict[str, str]) -> str:
    """The page. `same_text`: other families with the same text model; `others`: why a family was not inspected."""
    import transformers

    found = {family: result for family, result in sorted(results.items()) if isinstance(result, Result)}
    numbers: dict[str, int] = {}  # of reasons, in the order of the table
    rows = [[", ".join([family, *same_text.get(family, [])]), *row(result, numbers)] for family, result in found.items()]
    head = ["family", *(", ".join(kinds) for kinds in COLUMNS), ""]
    failed = [f"- {family}: {result}" for family, result in sorted(results.items()) if isinstance(result, str)]
    grouped: dict[str, list[str]] = {}
    for family, reason in sorted(others.items()):
        grouped.setdefault(reason, []).append(family)
    return INTRODUCTION.format(version=transformers.__version__) + "\n".join(
        [
            *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)),
            "\n## Reasons\n",
            *(f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in numbers.items()),
            f"\n{FURTHER}",
            "\n## Not inspected\n",
            *failed,
            *(f"- {reason}: {', '.join(names)}" for reason, names in grouped.items()),
            "",
        ]
    )


def row(result: Result, numbers: dict[str, int]) -> list[str]:
    """The cells of the table after the family's name; numbers new reasons."""
    cells = []
    for kinds in COLUMNS:
        reasons = dict.fromkeys(reason for kind in kinds for reason in result.reasons[kind])
        there = {result.n_there[kind] for kind in kinds}
        word = "yes" if not reasons else "–" if there == {0} else "some"
        cells.append(" ".join([word, *map(str, sorted(numbers.setdefault(reason, len(numbers) + 1) for reason in reasons))]))
    return [*cells, " ".join(["+"] * (not result.is_sum) + ["wrong: " + ", ".join(result.wrong)] * bool(result.wrong))]


def look(config: FamiliesConfig) -> None:
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401 what all families share, once for all processes

    transformers.logging.set_verbosity(100)
    torch.set_num_threads(1)
    unknown = [family for family in config.families if family not in families()]
    if unknown:
        raise InputError(f"expected families that transformers {transformers.__version__} has, got {', '.join(unknown)}")
    chosen = config.families or tuple(families())
    others, same_text = {family: reason for family in chosen if (reason := left_out(family))}, dict[str, list[str]]()
    for family in (family for family in chosen if family not in others):
        if (text := text_family(family)) != family:
            same_text.setdefault(text, []).append(family)
    results = {}
    for family in chosen:
        if family not in others and text_family(family) == family:
            results[family] = apart(family)
            print(f"{family}: {summary(results[family])}", flush=True)
    with atomic(config.out) as temporary:
        temporary.write_text(page(results, same_text, others), encoding="utf-8")
    print(f"wrote {config.out}: {len(results)} families")


def summary(result: Result | str) -> str:
    if isinstance(result, str):
        return result
    lacking = [kind for kind in KINDS if result.n_there[kind] < result.n_layers]
    return ("lacks " + ", ".join(lacking) if lacking else "all sites") + (f"; WRONG {', '.join(result.wrong)}" if result.wrong else "")


if __name__ == "__main__":
    run(look, FamiliesConfig, __doc__ or "")
