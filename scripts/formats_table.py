"""Rewrite the table of formats in docs/dictionaries.md from the rows in sae/dictionaries/formats/__init__.py."""

import argparse
from pathlib import Path

from sae.dictionaries.formats import FORMATS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "dictionaries.md"
START, END = "<!-- formats -->\n", "<!-- /formats -->\n"


def table() -> str:
    rows = [f"| {one.name} | {one.files} | {one.opens} | {one.note} | {one.proved} |" for one in FORMATS]
    return "\n".join(["| format | recognised by | kinds that open | notes | tested against |", "|---|---|---|---|---|", *rows, ""])


def page(text: str) -> str:
    """The page with the current table."""
    before, _, rest = text.partition(START)
    return before + START + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
