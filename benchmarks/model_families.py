"""Which sites hold in which families of language models: a tiny random model of each family of transformers is built and looked at.

Writes docs/model_families.md. Each family has a process of its own with limits on time and memory.
"""

import contextlib
import multiprocessing
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from activation_report import table
from tiny_models import families, left_out, tiny_model

from sae.command_line import run
from sae.disk.writing import atomic
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sites import EMBED, KINDS, parse_site

SECONDS, BYTES = 120, 8 << 30  # of one family
PAGE = Path(__file__).resolve().parents[1] / "docs" / "model_families.md"
COLUMNS = {
    EMBED: EMBED,
    "resid_pre": "resid_pre, resid_post",
    "attn_in": "attn_in",
    "q": "q, k, v",
    "head_out": "head_out",
    "attn_out": "attn_out",
    "resid_mid": "resid_mid",
    "mlp_in_nogain": "mlp_in_nogain",
    "mlp_in": "mlp_in",
    "mlp_act": "mlp_act",
    "mlp_out": "mlp_out",
}


@dataclass
class FamiliesConfig:
    families: tuple[str, ...] = ()
    """Families to look at, by `model_type`. Default: all."""
    out: Path = PAGE
    """Page to write."""


class Result(NamedTuple):
    """Of one family."""

    n_layers: int
    sites: dict[str, int]
    """how many blocks have it, by kind"""
    reasons: dict[str, list[str]]
    """why others have not: reason to kinds"""
    wrong: list[str]
    """sites that are said to be there and are not what they should be"""
    further: bool
    """the sum of resid_pre, attn_out and mlp_out is not yet resid_post"""


def look_at(family: str) -> Result:
    lm = LanguageModel(tiny_model(family), name=family)
    sites: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    for site in lm.sites():
        kind = parse_site(site).kind
        sites[kind] = sites.get(kind, 0) + 1
    for site, reason in lm.refused_sites().items():
        kinds = reasons.setdefault(reason, [])
        kinds += [kind] if (kind := parse_site(site).kind) not in kinds else []
    ids_sp = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    values = lm.record(ids_sp, lm.sites())
    return Result(lm.n_layers, sites, reasons, wrong_sites(lm, ids_sp, values), not sums_hold(lm.n_layers, values))


def wrong_sites(lm: LanguageModel, ids_sp: torch.Tensor, values: dict[str, torch.Tensor]) -> list[str]:
    """Those where a change is not seen or does nothing, or where no change does something."""
    plain, wrong = lm.logits(ids_sp), []
    for site, value in values.items():
        with lm.edited({site: torch.clone}):
            same = torch.equal(lm.logits(ids_sp), plain)
        new = value + value.pow(2).mean().sqrt() * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
        with lm.edited({site: lambda _, new=new: new}):
            seen = torch.allclose(lm.record(ids_sp, [site])[site], new, rtol=1e-4, atol=1e-4)
            changed = not torch.equal(lm.logits(ids_sp), plain)
        wrong += [] if same and seen and changed else [site]
    return wrong


def sums_hold(n_layers: int, values: dict[str, torch.Tensor]) -> bool:
    """In every block that has all of them."""
    for layer in range(n_layers):
        parts = [values.get(f"{kind}.{layer}") for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        if all(part is not None for part in parts):
            pre, attention, mlp, post = parts
            if not torch.allclose(pre + attention + mlp, post, rtol=1e-4, atol=1e-4):
                return False
    return True


def apart(family: str) -> Result | str:
    """`look_at` in a process of its own; why not, where that fails."""
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
        except Exception as error:  # whatever a family's own code does
            answer = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    pipe.send(answer)


def page(results: dict[str, Result | str], others: dict[str, str]) -> str:
    """The page; `others` says why a family was not looked at."""
    import transformers

    found = {family: result for family, result in results.items() if isinstance(result, Result)}
    reasons = list(dict.fromkeys(reason for result in found.values() for reason in result.reasons))
    letters = {reason: str(number) for number, reason in enumerate(sorted(reasons), 1)}
    rows = [[family, *(_cell(result, kind) for kind in COLUMNS), _notes(result, letters)] for family, result in sorted(found.items())]
    failed = [f"- {family}: {result}" for family, result in sorted(results.items()) if isinstance(result, str)]
    grouped: dict[str, list[str]] = {}
    for family, reason in sorted(others.items()):
        grouped.setdefault(reason, []).append(family)
    return INTRODUCTION.format(version=transformers.__version__) + "\n".join(
        [
            *table(["family", *COLUMNS.values(), "notes"], rows),
            "\n## Notes\n",
            *(f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in letters.items()),
            f"\n{FURTHER}",
            "\n## Not looked at\n",
            *failed,
            *(f"- {reason}: {', '.join(names)}" for reason, names in grouped.items()),
            "",
        ]
    )


INTRODUCTION = """# Which families of models have which sites

Made by `python benchmarks/model_families.py` with transformers {version}. Of each family of decoder-only text models a tiny random one was
built from its configuration class; [its sites](language_models.md#how-sites-are-found) were looked for, recorded, replaced and put back.
A site that is not there is refused with the reason given under its number. In every model that is loaded, sites are looked for
anew, so a real model whose configuration differs may have others.

"yes": in all blocks, "part": in some blocks, "–": in none.

"""
FURTHER = "\\+ The block goes on to change the stream after the MLP, so that resid_post is not resid_pre + attn_out + mlp_out."


def _cell(result: Result, kind: str) -> str:
    blocks = result.sites.get(kind, 0)
    return "–" if not blocks else "yes" if kind == EMBED or blocks == result.n_layers else "part"


def _notes(result: Result, letters: dict[str, str]) -> str:
    numbers = sorted((letters[reason] for reason in result.reasons), key=int)
    return " ".join([*numbers, *(["+"] if result.further else []), *(["wrong: " + ", ".join(result.wrong)] if result.wrong else [])])


def look(config: FamiliesConfig) -> dict[str, Result | str]:
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401 what all families share, once for all processes

    transformers.logging.set_verbosity(100)
    torch.set_num_threads(1)
    unknown = [family for family in config.families if family not in families()]
    if unknown:
        raise InputError(f"expected families that transformers {transformers.__version__} has, got {', '.join(unknown)}")
    chosen: Sequence[str] = config.families or list(families())
    others = {family: reason for family in chosen if (reason := left_out(family))}
    results = {}
    for family in chosen:
        if family not in others:
            results[family] = apart(family)
            print(f"{family}: {_said(results[family])}", flush=True)
    with atomic(config.out) as temporary:
        temporary.write_text(page(results, others), encoding="utf-8")
    print(f"wrote {config.out}: {len(results)} families")
    return results


def _said(result: Result | str) -> str:
    if isinstance(result, str):
        return result
    lacking = [kind for kind in KINDS if result.sites.get(kind, 0) < result.n_layers]
    return ("lacks " + ", ".join(lacking) if lacking else "all sites") + (f"; WRONG {', '.join(result.wrong)}" if result.wrong else "")


if __name__ == "__main__":
    run(look, FamiliesConfig, __doc__ or "")
