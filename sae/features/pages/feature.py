"""A feature as HTML: one renderer for notebook, server, exported folder and single files; no network, every piece of text escaped.

`feature_html` is the fragment they share; `FeatureView` shows it in a notebook.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.disk.writing import atomic
from sae.features.pages.assets import STYLE, TABLE_SCRIPT
from sae.features.pages.charts import activation_histogram, weight_histogram
from sae.features.pages.contexts import row_html, token_html
from sae.html import document, number, percent, visible, word_html
from sae.progress import progress
from sae.statistics import wilson_interval

if TYPE_CHECKING:
    from sae.features.explanations.explanation import Explanation
    from sae.features.index.reader import Context, Feature, FeatureIndex
    from sae.features.notes import Note, Notes

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
NEIGHBOURS = 8
ROWS = (
    (20, 4),
    (20, 2),
    (20, 1),
    (10, 1),
    (5, 1),
)  # contexts of the top and at random, and of each interval: as many as keep the page under
LARGEST = 90_000  # bytes, so that with the style and a server's frame it stays under 100 kB
BUCKET_BEFORE, BUCKET_AFTER = 16, 12  # shorter windows: there are up to 48 rows of them


@dataclass(frozen=True)
class FeatureView:
    """A feature in a notebook: the last line of a cell shows its page."""

    index: "FeatureIndex"
    feature: int

    def __post_init__(self) -> None:
        """Raises `InputError` if `feature` does not exist."""
        self.index.feature(self.feature)

    def _repr_html_(self) -> str:
        """In its own frame, so that the page's style stays in it; without scripts and without a network."""
        from sae.features.explanations.explanation import read_explanations

        explanations = read_explanations(self.index.folder).get(self.feature, ())
        html = feature_html(self.index, self.feature, explanations=explanations, link=None)
        page = document(f"Feature {self.feature}", html, STYLE, POLICY)
        frame = "width:100%;height:46rem;border:1px solid #8886;border-radius:8px;resize:vertical"
        page = page.replace("&", "&amp;").replace("'", "&#39;")  # all that must be in these quotes; escaping the rest is half as much again
        return f"<iframe sandbox='' style='{frame}' srcdoc='{page}'></iframe>"


def feature_html(
    index: "FeatureIndex",
    j: int,
    *,
    notes: "Notes | Mapping[int, Note] | None" = None,
    explanations: "Sequence[Explanation]" = (),
    link: Callable[[int], str | None] | None = lambda j: f"{j}.html",
) -> str:
    """Everything about one feature, as a fragment. Raises `InputError` if it does not exist.

    `notes` has its label, star and note; `explanations` are those of this feature; `link` returns the URL of another feature's
    page, or None; if `link` is None, other features are named but not linked.
    """
    index.prefetch(j)
    feature, info = index.feature(j), index.info
    columns = feature.columns
    model = info["model"]["name"].rstrip("/").rsplit("/", 1)[-1]  # the folder or hub name, without the path of whoever made it
    top = float(columns["max"])
    shares = [(token, f"{100 * part:.0f}%" if part >= 0.005 else "&lt;1%") for token, part in index.top_tokens(j, 10)]
    cards = [
        f"<section><h2>Statistics</h2>{_facts(feature, info)}</section>",
        f"<section><h2>Activations</h2>{activation_histogram(*index.histogram(j))}<h3>Fires on "
        f"<span class='soft'>share of its activation by token</span></h3>{_token_list(index, shares)}</section>",
        _lens_section(index, j),
        _neighbours_section(index, j, link),
    ]
    count = int(columns["count"])
    head = (
        f"<h1>Feature {j}{_note(notes, j)}<p class='soft'>{escape(index.place)} of {escape(model)}, {info['d_sae']:,} features</p>\n"
        f"{_explanations(explanations)}<div class='top'>{''.join(cards)}</div>\n"
    )
    usual = f"A fair sample of the {count:,}: what it usually does." if count else ""
    for rows, of_each in ROWS:
        examples = (
            "<div class='sides'>"
            + _contexts_section("Top activations", "The extremes; at most two from a document.", index.top_contexts(j, rows), top)
            + _contexts_section("Random activations", usual, index.random_contexts(j, rows), top)
            + f"</div>\n{_buckets_section(index, j, count, top, of_each)}"
        )
        if len(head.encode()) + len(examples.encode()) < LARGEST:
            break
    return (
        f"{head}{examples}"
        "<p class='soft'>Shade and hover give the activation; firing tokens are underlined, the thicker the stronger, and the row's own "
        "is bold. Faded tokens were not scanned. Click a row to unfold it.</p>"
    )


def _note(notes: "Notes | Mapping[int, Note] | None", j: int) -> str:
    note: Any = notes.get(j) if notes is not None else None
    if note is None:
        return "</h1>"
    label = f' <span class="label">{escape(note.label)}</span>' if note.label else ""
    star = ' <span class="star" role="img" aria-label="starred">★</span>' if note.starred else ""
    return f"{label}{star}</h1>" + (f"<p class='note'>{escape(note.note)}</p>" if note.note else "")


def _facts(feature: "Feature", info: dict[str, Any]) -> str:
    columns = feature.columns
    count, scanned = int(columns["count"]), int(info["tokens_scanned"])
    low, high = wilson_interval(count, scanned)
    density = percent(count / scanned) + (f" (one token in {round(scanned / count):,})" if 0 < 2 * count <= scanned else "")
    facts = {
        "density": f'{density}<br><span class="soft" title="Wilson interval, as if tokens were independent">'
        f"95 % interval {percent(low)} to {percent(high)}</span>",
        "fires on": f"{count:,} of {scanned:,} tokens scanned",
        "sequences": f"{int(columns['sequences']):,} in {int(columns['documents']):,} documents",
        "maximum": number(feature.maximum),
        "mean when firing": f"{number(columns['mean'])} ± {number(columns['std'])}",
        "skewness": number(columns["skewness"]),
        "kurtosis": number(columns["kurtosis"]),
        "decoder norm": number(columns["decoder_norm"]),
        "FVU rise if removed": f'<span title="change of the fraction of variance unexplained if this feature were left out">'
        f"{float(columns['fvu_contribution']):+.2g}</span>",
    }
    if "negative_share" in columns:
        facts["below 0"] = f"{percent(columns['negative_share'])} of activations, in blue; only the maximum has its sign"
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{text}</dd>' for name, text in facts.items())}</dl>"


def _explanations(explanations: "Sequence[Explanation]") -> str:
    if not explanations:
        return ""
    rows = []
    for explanation in explanations:
        scores = " · ".join(f"{escape(name.replace('_', ' '))} {_score(value)}" for name, value in explanation.scores.items())
        against = " · ".join(f"{escape(name.replace('_', ' '))} {_score(value)}" for name, value in explanation.baselines.items())
        rows.append(
            f"<dt>{escape(explanation.method)}</dt><dd>{visible(explanation.text)}<br><span class='soft'>{scores}"
            + (f" — baselines: {against}" if against else "")
            + "</span></dd>"
        )
    return f"<section class='why'><h2>Explanations</h2><dl>{''.join(rows)}</dl></section>\n"


def _score(value: Any) -> str:
    """A number, an interval, or a group of named ones."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{escape(str(name).replace('_', ' '))} {_score(part)}" for name, part in value.items()) + ")"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_score(part) for part in value) + "]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape("none" if value is None else str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _contexts_section(title: str, note: str, contexts: "list[Context]", top: float) -> str:
    rows = "\n".join(row_html(context, top) for context in contexts) or "<p>It never fires.</p>"
    return f"<section><h2>{title}</h2><p class='soft'>{note}</p>\n{rows}</section>\n"


def _buckets_section(index: "FeatureIndex", j: int, count: int, top: float, rows_of_each: int) -> str:
    buckets = [bucket for bucket in index.bucket_contexts(j, rows_of_each, BUCKET_BEFORE, BUCKET_AFTER) if bucket.contexts]
    blocks = []
    for bucket in buckets:
        low = f"{number(bucket.low)} to" if bucket.low else "below"
        share = f"{bucket.count:,} activations, {percent(bucket.count / max(count, 1))}"
        rows = "\n".join(row_html(context, top) for context in bucket.contexts)
        blocks.append(f"<div><h3>{low} {number(bucket.high)} <span class='soft'>{share}</span></h3>\n{rows}</div>")
    if not blocks:
        return ""
    return (
        "<section><h2>By interval</h2><p class='soft'>Doublings of the activation, strongest first, each with a fair sample of its own."
        f"</p>\n<div class='buckets'>{''.join(blocks)}</div></section>\n"
    )


def _lens_section(index: "FeatureIndex", j: int) -> str:
    up, down = index.lens_tokens(j), index.lens_tokens(j, bottom=True)
    if not up:
        return f"<section><h2>Logit lens</h2><p class='soft'>{escape(index.info['logit_lens'])}</p></section>"
    lists = [_token_list(index, [(token, f"{value:+.2f}") for token, value in side]) for side in (up, down)]
    return (
        f"<section class='lens'><h2>Logit lens</h2><div class='pairs'><div><p>promotes</p>{lists[0]}</div>"
        f"<div class='down'><p>suppresses</p>{lists[1]}</div></div>{weight_histogram(*index.lens_histogram(j))}</section>"
    )


def _neighbours_section(index: "FeatureIndex", j: int, link: Callable[[int], str | None] | None) -> str:
    near = [(k, f"{cosine:+.2f}", "") for k, cosine in index.cosine_neighbours(j, NEIGHBOURS)]
    together = [(c.feature, f"{100 * c.share:.0f}%", f"{c.together:,} tokens") for c in index.coactive(j, NEIGHBOURS)]
    lists = [
        "".join(
            f"<li>{feature_link(k, link)} <span class='k'>{_words(index, index.top_tokens(k, 2))}</span>"
            f"<span title='{title}'>{text}</span></li>"
            for k, text, title in side
        )
        for side in (near, together)
    ]
    none = index.info.get("cosine_neighbours")
    alike = f"<p class='soft'>{escape(none)}</p>" if none else f"<ol>{lists[0]}</ol>"
    return (
        "<section class='near'><h2>Neighbours</h2><div class='pairs'><div><p title='cosine of the decoder rows'>alike in direction</p>"
        f"{alike}</div><div><p title='share of this feature&#39;s tokens on which the other fires too'>fire together</p>"
        f"<ol>{lists[1]}</ol></div></div></section>"
    )


def feature_link(j: int, link: Callable[[int], str | None] | None) -> str:
    address = link(j) if link is not None else None
    return str(j) if address is None else f'<a href="{escape(address)}">{j}</a>'


def _token_list(index: "FeatureIndex", tokens: list[tuple[int, str]]) -> str:
    items = (f"<li><code>{word_html(index.vocabulary.spelling(token))}</code><span>{text}</span></li>" for token, text in tokens)
    return f"<ol>{''.join(items)}</ol>"


def _words(index: "FeatureIndex", tokens: list) -> str:
    return " ".join(f"<code>{word_html(index.vocabulary.spelling(token))}</code>" for token, _ in tokens)


def write_pages(index: "FeatureIndex", features: Sequence[int], folder: Path, heading: str = "Features") -> Path:
    """Writes a page per feature, each leading to the next of `features`, and index.html, whose path is returned.

    Raises `InputError` for a feature that does not exist, before anything is written.
    """
    for j in features:
        index.feature(j)
    written = set(features)
    with progress("write pages", len(features), "pages") as bar:
        for i, j in enumerate(features):
            around = (features[i - 1] if i else None, features[i + 1] if i + 1 < len(features) else None)
            html = feature_html(index, j, link=lambda k: f"{k}.html" if k in written else None)
            text = document(f"Feature {j} · {index.place}", navigation(*around) + html, STYLE, POLICY)
            with atomic(folder / f"{j}.html") as temporary:
                temporary.write_text(text, encoding="utf-8")
            bar.advance(1)
    with atomic(folder / "index.html") as temporary:
        temporary.write_text(document(heading, table_html(index, features, heading), STYLE, POLICY), encoding="utf-8")
    return folder / "index.html"


def navigation(previous: int | None, following: int | None) -> str:
    links = ['<a href="index.html">all features</a>']
    if previous is not None:
        links.append(f'<a rel="prev" href="{previous}.html">← {previous}</a>')
    if following is not None:
        links.append(f'<a rel="next" href="{following}.html">{following} →</a>')
    return f"<nav>{''.join(links)}</nav>\n"


def table_html(index: "FeatureIndex", features: Sequence[int], heading: str) -> str:
    """The listed features as a table that sorts at a click on a heading and filters while typing; readable without its script."""
    numbers = ("density", "count", "max", "mean")
    head = "".join(
        f'<th class="num"><button>{name}</button></th>' if name in ("feature", *numbers) else f"<th><button>{name}</button></th>"
        for name in ("feature", *numbers, "promotes", "fires on", "strongest context")
    )
    rows = []
    for j in features:
        feature = index.feature(j)
        columns = feature.columns
        texts = (percent(columns["density"]), f"{int(columns['count']):,}", number(feature.maximum), number(columns["mean"]))
        cells = [f'<td class="num" data-v="{j}"><a href="{j}.html">{j}</a></td>']
        cells += [f'<td class="num" data-v="{float(columns[name]):.6g}">{text}</td>' for name, text in zip(numbers, texts)]
        lists = (index.lens_tokens(j, 5), index.top_tokens(j, 3))
        cells += [f"<td class='tok'>{_words(index, tokens)}</td>" for tokens in lists]
        best = index.top_contexts(j, 1, before=6, after=4)
        text = ""
        for context in best:
            parts = [token_html(t, 0, True, 0) if i == context.centre else visible(t) for i, t in enumerate(context.texts)]
            text = "".join(parts)
        rows.append(f"<tr>{''.join(cells)}<td class='tok'>{text}</td></tr>")
    return (
        f"<h1>{escape(heading)}</h1><p class='soft'>{escape(index.place)}, {index.info['tokens_scanned']:,} tokens scanned</p>"
        f"<p><input id='filter' type='search' placeholder='filter by token or number' aria-label='filter'> <span id='count' class='soft'>"
        f"{len(features)} of {len(features)}</span></p>\n<section class='scroll'><table><thead><tr>{head}</tr></thead><tbody>\n"
        + "\n".join(rows)
        + f"\n</tbody></table></section><script>{TABLE_SCRIPT}</script>"
    )
