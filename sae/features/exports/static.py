"""Every feature's page in one folder that opens from file://, without a server and without a network.

index.html and app.js show the table, find features by word and by token, and put the pages up; stats.js holds the table's columns,
d/NNNN.js the pages of 64 features each, t/NNNN.js the features of 1,024 tokens each. All are classic scripts that hand their data to
app.js, because browsers refuse fetch and modules on file://. The pages come from the one renderer and are stored deflated.
"""

import base64
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae.disk.folders import fresh_folder
from sae.errors import InputError
from sae.features.index.reader import FeatureIndex
from sae.features.pages.assets import STYLE
from sae.features.pages.feature import feature_html
from sae.html import document
from sae.progress import progress

if TYPE_CHECKING:
    from sae.features.explanations.explanation import Explanation
    from sae.features.notes import Note

POLICY = "default-src 'none'; script-src 'self' file:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SHARD = 64  # pages per file: about 0.8 MB
TOKENS = 1024  # token ids per file of t/
LIKERS = 50  # features listed for a token
LEVEL = 6  # of compression


class PageShard(NamedTuple):
    """The pages that one process renders at a time."""

    number: int
    features: list[int]
    notes: "dict[int, Note]"
    explanations: "dict[int, list[Explanation]]"


def export_static(
    index: FeatureIndex,
    out: Path,
    features: Sequence[int],
    *,
    heading: str = "Features",
    notes: "dict[int, Note] | None" = None,
    explanations: "dict[int, list[Explanation]] | None" = None,
    processes: int | None = None,
) -> Path:
    """Writes the folder completely or not at all, in place of an older export, and returns the path of its index.html.

    `processes` render at the same time, by default as many as there are cores. Raises `InputError` for a feature there is not, and for
    a folder that holds something else.
    """
    notes, explanations = notes or {}, explanations or {}
    features = [int(j) for j in features]
    for j in features:
        index.feature(j)
    shards = [
        PageShard(
            low // SHARD,
            part,
            {j: notes[j] for j in part if j in notes},
            {j: explanations[j] for j in part if j in explanations},
        )
        for low, part in ((low, features[low : low + SHARD]) for low in range(0, len(features), SHARD))
    ]
    processes = min(processes or _cores(), len(shards))
    with fresh_folder(out, "stats.js", "export") as folder:
        for name in ("d", "t"):
            (folder / name).mkdir()
        _write(folder / "index.html", _page(heading))
        _write(folder / "app.js", resources.files("sae.features.exports").joinpath("web/export.js").read_text(encoding="utf-8"))
        _write(folder / "stats.js", _call("stats", _stats(index, features, heading, notes, explanations)))
        _write_tokens(index, folder, features)
        with progress("write pages", len(features), "pages") as bar:
            for shard, text in _rendered(index, shards, processes):
                _write(folder / "d" / f"{shard.number:04d}.js", text)
                bar.advance(len(shard.features))
    return out / "index.html"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rendered(index: FeatureIndex, shards: list[PageShard], processes: int) -> Iterator[tuple[PageShard, str]]:
    linked = {j for shard in shards for j in shard.features}
    if processes <= 1:
        yield from ((shard, _render(index, linked, shard)) for shard in shards)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in any state
    try:
        with ProcessPoolExecutor(processes, context, _open, (index.folder.resolve(), linked)) as pool:
            yield from zip(shards, pool.map(_render_here, shards))
    except BrokenProcessPool:
        raise InputError("a process that renders pages was killed, perhaps for want of memory; try again with fewer --processes") from None


_mine: tuple[FeatureIndex, set[int]]  # of a rendering process


def _open(folder: Path, linked: set[int]) -> None:
    global _mine
    _mine = FeatureIndex.open(folder), linked


def _render_here(shard: PageShard) -> str:
    return _render(*_mine, shard)


def _render(index: FeatureIndex, linked: set[int], shard: PageShard) -> str:
    def link(j: int) -> str | None:
        return f"#/f/{j}" if j in linked else None

    pages = {}
    for j in shard.features:
        html = feature_html(index, j, notes=shard.notes, explanations=shard.explanations.get(j, ()), link=link)
        pages[j] = base64.b64encode(zlib.compress(html.encode(), LEVEL)).decode()
    return _call("pages", shard.number, pages)


def _stats(
    index: FeatureIndex, features: list[int], heading: str, notes: "dict[int, Note]", explanations: "dict[int, list[Explanation]]"
) -> dict[str, Any]:
    """The table: one value of each column for every feature."""
    word = index.vocabulary.spelling
    columns = {name: [_short(value) for value in index.columns[name][features].tolist()] for name in ("density", "count", "max", "mean")}
    columns["max"] = [_short(value) for value in (index.columns["max"][features] * index.signs(features)).tolist()]
    columns["fvu"] = [_short(value) for value in index.columns["fvu_contribution"][features].tolist()]
    lens = index.lens(features)[0] if index.has_lens else None
    return {
        "heading": heading,
        "site": index.place,
        "tokens": int(index.info["tokens_scanned"]),
        "shard": SHARD,
        "features": features,
        "columns": columns,
        "fires": [[word(token) for token, _ in index.top_tokens(j, 3)] for j in features],
        "promotes": [[word(token) for token in ids] for ids in lens[:, :4].tolist()] if lens is not None else [],
        "labels": {j: note.label for j, note in notes.items() if note.label},
        "stars": [j for j, note in notes.items() if note.starred],
        "explanations": {j: found[0].text for j, found in explanations.items() if found},
    }


def _write_tokens(index: FeatureIndex, folder: Path, features: list[int]) -> None:
    """tokens.js: the spelling of every listed token; t/NNNN.js: [feature, share in thousandths] of each, strongest first."""
    shown, spellings = set(features), {}
    of_all = LIKERS if len(shown) == index.d_sae else index.d_sae  # those of a few may stand far behind others
    vocabulary = index.vocabulary
    for low in range(0, len(vocabulary.pieces), TOKENS):
        postings = {}
        for token in range(low, min(low + TOKENS, len(vocabulary.pieces))):
            likers = ((j, share) for j, share in index.token_features(token, of_all) if j in shown)
            listed = [[j, round(1000 * share)] for j, share in islice(likers, LIKERS)]
            if listed:
                postings[token], spellings[token] = listed, vocabulary.spelling(token)
        if postings:
            _write(folder / "t" / f"{low // TOKENS:04d}.js", _call("postings", low // TOKENS, postings))
    _write(folder / "tokens.js", _call("vocabulary", spellings, TOKENS))


def _page(heading: str) -> str:
    style = resources.files("sae.features.exports").joinpath("web/export.css").read_text(encoding="utf-8")
    body = (
        '<header><nav><a href="#/">all features</a><a href="#/t">by token</a><a href="#/random">random</a>'
        '<button id="help">keys <kbd>?</kbd></button></nav><input id="search" type="search" autocomplete="off" aria-label="search" '
        'placeholder="word, or density&gt;0.01"></header>\n'
        '<main id="main" tabindex="-1"><noscript>The script app.js shows the features; allow it to run.</noscript></main>\n'
        '<dialog id="keys"></dialog><script src="app.js"></script><script src="stats.js"></script>'
    )
    return document(heading, body, STYLE + style, POLICY)


def _call(name: str, *values: Any) -> str:
    return f"SAE.{name}({','.join(json.dumps(value, ensure_ascii=False, separators=(',', ':')) for value in values)})\n"


def _short(value: float) -> float | None:
    """Four digits are enough for a table; NaN is not JSON."""
    return value if isinstance(value, int) else float(f"{value:.4g}") if value == value else None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
