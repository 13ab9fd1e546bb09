"""The page of a circuit of features: its nodes with links to their own pages, the edges, the curves, and how to steer with it.

One HTML file without a script and without a network; every text is escaped.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from sae.dictionaries.source import weights_crc32
from sae.disk.writing import atomic
from sae.errors import InputError
from sae.features.browser.serve import BrowseConfig
from sae.features.browser.state import MOST_STEERED
from sae.features.index.reader import FeatureIndex
from sae.html import document, figure, visible, word_html
from steering.circuits.features.files import FeatureCircuit, NodeRow
from steering.circuits.features.report import COLUMNS, cell
from steering.circuits.features.sites import FeatureSite
from steering.circuits.finding.report import interval
from steering.report_style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SHOWN_EDGES = 100
WORDS = ("fires on", "promotes")
"""columns with tokens"""
OWN_STYLE = """
a{color:rgb(var(--pos))}
pre{background:var(--grid);padding:.6rem .8rem;border-radius:6px;overflow-x:auto;font-size:.85rem}
.bar{display:inline-block;height:.6rem;border-radius:2px;background:rgb(var(--pos));vertical-align:middle;margin-right:.4rem}
.bar.minus{background:rgb(var(--neg))}
code{font:.86rem ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
td.words{white-space:normal;max-width:22rem}td.words code{margin-right:.4rem}
"""


@dataclass(frozen=True)
class Known:
    """Data about one dictionary's features."""

    index: FeatureIndex | None = None
    port: int = 0
    """port on which `sae browse` will serve the index"""
    export: Path | None = None
    """a folder that `sae export` wrote"""

    def link(self, feature: str, page: Path) -> str | None:
        """The URL of a feature's page, from the page that links to it."""
        if self.export is not None:
            return f"{Path(os.path.relpath(self.export.resolve(), page.resolve().parent)).as_posix()}/index.html#/f/{feature}"
        return f"http://127.0.0.1:{self.port}/f/{feature}" if self.index is not None else None


def known_of(sites: Sequence[FeatureSite], indexes: Sequence[Path], exports: Sequence[Path]) -> dict[str, Known]:
    """By site, the folders' data about its features.

    Indexes are recognised by their dictionary; exports are in the order of the model. Raises `InputError` for an index of another
    dictionary, for folders that are not exports, and if there are not as many as dictionaries.
    """
    if exports and len(exports) != len(sites):
        raise InputError(f"expected as many folders of --export as dictionaries, {len(sites)}, got {len(exports)}; give one for each")
    for folder in exports:
        if not (folder / "stats.js").is_file():
            raise InputError(f"expected a folder that sae export --format static wrote, got {folder}; export the features there")
    opened = [FeatureIndex.open(folder) for folder in indexes]
    found: dict[str, Known] = {}
    for number, site in enumerate(sites):
        own = next((index for index in opened if _is_of(index, site)), None)
        port = BrowseConfig.port + (opened.index(own) if own is not None else 0)
        found[site.writes] = Known(own, port, exports[number] if exports else None)
    for index in opened:
        if not any(known.index is index for known in found.values()):
            raise InputError(
                f"expected feature indexes of the dictionaries, got {index.folder} of {index.info['dictionary']}; leave it out"
            )
    return found


def _is_of(index: FeatureIndex, site: FeatureSite) -> bool:
    sampled = "dictionary_crc32_of" in index.info
    crc32 = site.crc32 if sampled else weights_crc32(site.source, [site.dictionary.parts()])
    return bool(index.info["dictionary_crc32"] == crc32)


def write_page(circuit: FeatureCircuit, known: dict[str, Known], vector: Path, path: Path) -> None:
    """Writes the page, atomically. Raises `InputError` for a place that cannot be written."""
    parts = [_head(circuit), _steering(circuit, known, vector), _nodes(circuit, known, path), _edges(circuit), *_measures(circuit)]
    title = f"Features that do {circuit.task['name']} in {circuit.model}"
    page = document(title, "\n".join(filter(None, parts)), STYLE + OWN_STYLE, POLICY)
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class='soft'>{escape(note)}</p>{body}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; all but the first and those under `WORDS` stand to the right."""
    head = "".join(f"<th{' class=n' if at and text not in WORDS else ''}>{escape(text)}</th>" for at, text in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(one if one.startswith("<td") else f"<td{' class=n' if at else ''}>{one}</td>" for at, one in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _head(circuit: FeatureCircuit) -> str:
    task, example, found = circuit.task, circuit.task["example"], circuit.evaluation["circuit"]
    facts = {
        "model": circuit.model,
        "dictionaries": ", ".join(f"{row['source']} at {row['writes']}" for row in circuit.dictionaries),
        "clean": "".join(example["clean"]),
        "corrupt": "".join(example["corrupt"]),
        "scores by": circuit.method["scores"],
        "pairs": f"{task['found_on']} to find it on, {task['held_out']} to measure it on",
        "faithfulness": f"{interval(found['errors_in'])} with the errors, {interval(found['errors_out'])} without",
        "command": circuit.method["settings"]["command"],
    }
    pairs = "".join(f"<div><dt>{escape(key)}</dt><dd>{visible(str(value))}</dd></div>" for key, value in facts.items())
    return f"<h1>Features that do {visible(task['name'])} in {visible(circuit.model)}</h1><dl class='facts'>{pairs}</dl>"


def _steering(circuit: FeatureCircuit, known: dict[str, Known], vector: Path) -> str:
    if not any(row["weight"] for row in circuit.nodes):
        return ""
    answer = ", ".join(f"“{text}”" for text in circuit.method["steering"]["answer"])
    prompt = "".join(circuit.task["example"]["corrupt"])
    commands = ["sae steer " + shlex.join(["--model", circuit.model, "--vector", str(vector), "--strength", "1", "--prompt", prompt])]
    links = []
    for site, one in known.items():
        if one.index is None:
            continue
        chosen = [row for row in circuit.features(site) if row["weight"]][:MOST_STEERED]
        fields = [("prompt", prompt)]
        for row in chosen:
            feature = row["node"].partition("/")[2]
            highest = one.index.feature(int(feature)).maximum
            if highest:
                fields += [("feature", feature), ("strength", f"{row['weight'] / highest:.3g}")]
        commands.append("sae browse " + shlex.join(["--index", str(one.index.folder), "--port", str(one.port)]))
        url = f"http://127.0.0.1:{one.port}/steer?{urlencode(fields)}"
        text = f"Steer with its {len(chosen)} strongest features at {site} in the browser"
        links.append(f"<p><a href='{escape(url)}'>{escape(text)}</a>, while <code>sae browse</code> runs</p>")
    note = (
        f"Towards {answer}: each feature is added at every position with its weight, which is the largest value it has in clean prompts of "
        "that answer minus the one in their corrupt sides, times the strength."
    )
    found, measured = circuit.evaluation.get("steering"), ""
    if found:
        others = found["random"]
        measured = (
            f"<p>Measured on {found['pairs']} held-out corrupt prompts, strength 1: the metric changes by "
            f"{escape(interval(found['steered_minus_corrupt']))}; clean minus corrupt is {escape(interval(found['clean_minus_corrupt']))}; "
            f"{len(others)} random directions as long change it by {figure(min(others))} to {figure(max(others))}.</p>"
        )
    return _section("Steer this circuit", note, f"<pre>{escape(chr(10).join(commands))}</pre>{''.join(links)}{measured}")


def _nodes(circuit: FeatureCircuit, known: dict[str, Known], page: Path) -> str:
    most = max((abs(row["score"]) for row in circuit.nodes), default=0) or 1
    heads, rows = ["node", "score", "clean", "corrupt", "weight", "frequency"], []
    indexed = any(one.index is not None for one in known.values())
    for row in circuit.nodes:
        site, _, feature = row["node"].partition("/")
        link = known[site].link(feature, page) if feature.isdigit() else None
        name = f"<code>{escape(row['node'])}</code>"
        bar = f"<span class='bar{' minus' if row['score'] < 0 else ''}' style='width:{100 * abs(row['score']) / most:.0f}px'></span>"
        cells = [f"<a href='{escape(link)}'>{name}</a>" if link else name, bar + figure(row["score"], signed=True)]
        cells += [figure(value) for value in (row["clean"], row["corrupt"], row["weight"], row["frequency"])]
        rows.append(cells + (_words(known[site].index, row) if indexed else []))
    note = (
        "Score: an estimate of how far the metric falls when the node alone has its corrupt value. Clean and corrupt: the mean over pairs "
        "of its largest value in the prompt. Frequency: share of the pairs' tokens on which it is active."
    )
    return _section("Nodes", note, _table([*heads, *(WORDS if indexed else ())], rows))


def _words(index: FeatureIndex | None, row: NodeRow) -> list[str]:
    """Tokens on which the feature fires, and tokens that its logit lens raises most."""
    feature = row["node"].partition("/")[2]
    if index is None or not feature.isdigit():
        return ["<td></td>", "<td></td>"]
    lists = index.top_tokens(int(feature), 4), index.lens_tokens(int(feature), 4)
    spelled = ["".join(f"<code>{word_html(index.vocabulary.spelling(token))}</code>" for token, _ in tokens) for tokens in lists]
    return [f"<td class='words'>{one}</td>" for one in spelled]


def _edges(circuit: FeatureCircuit) -> str:
    if not circuit.edges:
        return ""
    rows = [[f"<code>{escape(row['edge'])}</code>", figure(row["score"], signed=True)] for row in circuit.edges[:SHOWN_EDGES]]
    note = f"The {len(rows)} strongest. Score: the part of the metric that the later node carries because of the earlier one."
    return _section("Edges", note, _table(["edge", "score"], rows))


def _measures(circuit: FeatureCircuit) -> list[str]:
    found: dict[str, Any] = circuit.evaluation
    rows = [[f"{row['nodes']:,}", *(escape(cell(name, row[name])) for name in COLUMNS)] for row in found["curve"]]
    note = (
        f"Faithfulness on {found['n_pairs']} held-out pairs, with 95 % intervals: 1 as the whole model, 0 as with no node inside. "
        "Nodes of the largest scores by the same method. Errors in: what the dictionaries miss stays, for any number of nodes. Random "
        "features: mean and highest of draws of features that fire as often, errors in."
    )
    parts = [_section("How good it is, beside other directions", note, _table(["nodes", *COLUMNS.values()], rows))]
    if "completeness" in found:
        sums = [
            [escape(row["site"]) + ("" if row["residual"] else " *"), *(figure(row[key]) for key in ("features", "skip", "error", "all"))]
            for row in found["completeness"]
        ]
        note = (
            "Scores over the metric's change. 1 at a site of the stream is all of it; at others (*) the share that passes through the site."
        )
        parts.append(_section("What the scores account for", note, _table(["site", "features", "skip", "error", "all"], sums)))
    return parts
