"""The server's pages as HTML: every piece of text escaped, every link and form complete without the script."""

from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import numpy as np

from sae.disk.writing import jsonable
from sae.features.browser.query import PAGE, Query
from sae.features.pages.feature import feature_html
from sae.html import number, percent, word_html

if TYPE_CHECKING:
    from sae.features.browser.state import Browser

KEYS = (
    ("j k", "next and previous in the list (on a list: move, Enter opens)"),
    ("[ ]", "feature number less and plus one"),
    ("r", "a random feature of the list"),
    ("/", "search"),
    ("s", "star"),
    ("e", "edit the label (Enter keeps it)"),
    ("?", "this help"),
)
COLUMNS = {
    "feature": "feature", "label": "label", "density": "density", "max": "max", "mean": "mean",
    "fvu_contribution": "FVU rise if removed", "top_token": "fires on",
}  # fmt: skip
WORDS = ("label", "top_token")  # columns of text: sorted from the front, and not aligned as numbers
SEARCHES = {
    "text": "in labels, explanations and top tokens",
    "fires": "features that fire on the word",
    "promotes": "that promote the word",
}

MATCHES = {"fires": "F1 of its firing on the word", "promotes": "what one unit of its activation adds to the word's logit"}


def page(title: str, body: str, query: Query | None = None) -> str:
    """A whole page with the header that all have; `query` is the list that search and random continue from."""
    query = query or Query()
    params = escape(query.params())
    keys = "".join(f"<dt><kbd>{escape(key)}</kbd></dt><dd>{escape(what)}</dd>" for key, what in KEYS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(title)}</title>
<link rel="stylesheet" href="/style.css"><script src="/app.js" defer></script></head>
<body><nav class="head"><a href="/?{params}">Features</a><a href="/prompt">Prompt</a><a href="/steer">Steer</a><a href="/lists">Lists</a>
<a data-key="r" href="/random?{params}">Random</a>
<form action="/" role="search"><input data-key="/" type="search" name="q" value="{escape(query.q) if query.how == "text" else ""}"
 maxlength="200" placeholder="label, explanation, token or number" aria-label="search"></form>
<button type="button" data-key="?">Keys</button></nav>
<main>{body}</main>
<dialog id="keys"><h2>Keys</h2><dl>{keys}</dl><form method="dialog"><button>Close</button></form></dialog></body></html>
"""


def alert(sentence: str) -> str:
    return f'<p role="alert" class="refusal">{escape(sentence)}</p>' if sentence else ""


def refusal(sentence: str) -> str:
    return page("Not possible", f"<h1>That is not possible</h1>{alert(sentence)}")


def feature_row(browser: "Browser", j: int) -> dict[str, Any]:
    """A row of the table as plain values."""
    index, note = browser.index, browser.notes.get(j)
    values = {name: float(index.columns[name][j]) for name in ("density", "max", "mean", "fvu_contribution")}
    values["max"] = index.feature(j).maximum
    return {
        "feature": j,
        "label": note.label,
        "starred": note.starred,
        "explanation": next((explanation.text for explanation in browser.explanations.get(j, ())), ""),
        **jsonable(values),
        "fires_on": [index.vocabulary.spelling(token) for token, _ in index.top_tokens(j, 3)],
        "promotes": [index.vocabulary.spelling(token) for token, _ in index.lens_tokens(j, 3)],
    }


def name_html(browser: "Browser", j: int) -> str:
    """What to call a feature in a line: its label, its explanation or its top token."""
    text = browser.notes.get(j).label or next((explanation.text for explanation in browser.explanations.get(j, ())), "")
    if text:
        return escape(text[:40])
    return "".join(f"<code>{word_html(browser.index.vocabulary.spelling(token))}</code>" for token, _ in browser.index.top_tokens(j, 1))


def table(browser: "Browser", query: Query, number_of_page: int, failure: str = "") -> str:
    """One page of a list; `failure` says why it cannot be made, above the form."""
    features = np.zeros(0, np.int32) if failure else browser.tables.features(query)
    pages = max(1, -(-len(features) // PAGE))
    current = min(number_of_page, pages)
    begin = (current - 1) * PAGE
    rows = "".join(_table_row(browser, query, int(j), begin + i) for i, j in enumerate(features[begin : begin + PAGE]))
    heads = []
    for name, title in COLUMNS.items():
        on = query.order == name
        up = not query.up if on else name in (*WORDS, "feature")
        kind = f' aria-sort="{"ascending" if query.up else "descending"}"' if on else ""
        numeric = "" if name in WORDS else ' class="num"'
        heads.append(f'<th{numeric}{kind}><a href="/?{_changed(query, sort=name, up="1" if up else "")}">{title}</a></th>')
    turns = " ".join(
        f'<a href="/?{_changed(query, page=str(to))}">{text}</a>' if 1 <= to <= pages else f"<span class='soft'>{text}</span>"
        for text, to in (("‹ before", current - 1), (f"page {current:,} of {pages:,}", 0), ("next ›", current + 1))
    )
    index = browser.index
    match = f'<th class="num" title="{MATCHES[query.how]}">match</th>' if query.q and query.how in MATCHES else ""
    body = f"""<h1>{escape(query.list) or "Features"}</h1>
<p class="soft">{escape(index.place)}, {index.info["tokens_scanned"]:,} tokens scanned</p>{_filters(query)}{alert(failure)}
<p><span id="total">{len(features):,} of {index.d_sae:,} features</span> {turns}{_hint(query, len(features))}</p>
<section class="scroll"><table class="features"><thead><tr>{"".join(heads)}<th>promotes</th>{match}</tr></thead><tbody>
{rows}</tbody></table></section><p>{turns}</p>"""
    return page("Features", body, query)


def _hint(query: Query, found: int) -> str:
    """Suggests another search for a word that no label, explanation or top token has."""
    if found or not query.q or query.how != "text":
        return ""
    return f' · <a href="/?{_changed(query, how="fires")}">features that fire on it</a>'


def _changed(query: Query, **changes: str) -> str:
    """The list's address with some parameters changed; an empty one goes."""
    kept = dict(part.split("=", 1) for part in query.params().split("&") if part)
    for name, value in changes.items():
        kept.pop(name, None)
        if value:
            kept[name] = quote(value)
    return escape("&".join(f"{name}={value}" for name, value in kept.items()))


def _table_row(browser: "Browser", query: Query, j: int, at: int) -> str:
    facts = feature_row(browser, j)
    kind, name = ("label", facts["label"]) if facts["label"] else ("soft", facts["explanation"])
    fires, promotes = (" ".join(f"<code>{word_html(text)}</code>" for text in facts[which]) for which in ("fires_on", "promotes"))
    fvu = "" if facts["fvu_contribution"] is None else f"{facts['fvu_contribution']:+.2g}"
    texts = (percent(facts["density"]), number(facts["max"]), number(facts["mean"]), fvu)
    numbers = "".join(f'<td class="num">{text}</td>' for text in texts)
    address, star = escape(f"/f/{j}?{query.params(at=str(at))}"), "★ " if facts["starred"] else ""
    return (
        f'<tr><td class="num"><a class="open" href="{address}">{star}{j}</a></td>'
        f'<td class="name"><span class="{kind}">{escape(name)}</span></td>{numbers}'
        f'<td class="tok">{fires}</td><td class="tok">{promotes}</td>{_match(browser, query, j)}</tr>\n'
    )


def _match(browser: "Browser", query: Query, j: int) -> str:
    if not query.q or query.how not in MATCHES:
        return ""
    return f'<td class="num">{browser.tables.match(query, j):.2f}</td>'


def _filters(query: Query) -> str:
    """The form of the list: what it is searched and filtered by; sorting goes by the table's heads."""

    def field(name: str, title: str) -> str:
        value = getattr(query, name)
        text = "" if value is None else f"{value:.15g}" if isinstance(value, float) else value
        return f'<label>{title} <input name="{name}" value="{escape(text)}" size="8"></label>'

    def check(name: str, title: str) -> str:
        return f'<label><input type="checkbox" name="{name}" value="1"{" checked" if getattr(query, name) else ""}> {title}</label>'

    options = "".join(f'<option value="{how}"{" selected" if how == query.how else ""}>{title}</option>' for how, title in SEARCHES.items())
    hidden = f'<input type="hidden" name="list" value="{escape(query.list)}">' if query.list else ""
    return f"""<form action="/" class="filters">{hidden}
<p><input type="search" name="q" value="{escape(query.q)}" placeholder="search, or one|two" aria-label="search for">
<select name="how" aria-label="where">{options}</select></p>
<p>{field("density_min", "density from")}{field("density_max", "to")}{field("max_min", "max from")}{field("max_max", "to")}
{field("fvu_min", "FVU rise if removed from")}{field("fvu_max", "to")}{field("token", "top token has")}{field("label", "label has")}
{check("starred", "starred")}{check("labelled", "labelled")}{check("dead", "dead too")}
<button>Show</button> <a href="/">all</a></p></form>"""


def feature(browser: "Browser", j: int, query: Query, at: int | None) -> str:
    """A feature's page: its place in its list, its label and notes, and the fragment that all renderers share."""
    features, params = browser.tables.features(query), escape(query.params())
    if at is None or not 0 <= at < len(features) or features[at] != j:
        places = np.flatnonzero(features == j)
        at = int(places[0]) if len(places) else None
    links = [f'<a href="/?{params}">{"not in this list" if at is None else f"{at + 1:,} of {len(features):,}"}</a>']
    for key, name, place in (("k", "‹ before", -1 if at is None else at - 1), ("j", "next ›", 0 if at is None else at + 1)):
        if 0 <= place < len(features):
            links.append(f'<a data-key="{key}" href="/f/{features[place]}?{escape(query.params(at=str(place)))}">{name}</a>')
    for key, other in (("[", j - 1), ("]", j + 1)):
        if 0 <= other < browser.index.d_sae:
            links.append(f'<a data-key="{key}" href="/f/{other}?{params}">#{other}</a>')
    links.append(f'<a href="/steer?feature={j}&amp;strength=1">steer with it</a>')
    body = feature_html(
        browser.index,
        j,
        notes=browser.notes,
        explanations=browser.explanations.get(j, ()),
        link=lambda other: f"/f/{other}?{params}",
    )
    editor = _editor(browser, j, f"/f/{j}?{escape(query.params(at=str(at or 0)))}")
    return page(f"Feature {j}", f'<nav class="place">{"".join(links)}</nav>\n{editor}\n{body}', query)


def _editor(browser: "Browser", j: int, address: str) -> str:
    note, lists = browser.notes.get(j), browser.notes.lists()
    names = "".join(f'<option value="{escape(name)}">' for name in lists)
    inside = "".join(
        f'<button name="remove" value="{escape(name)}" title="remove from this list">{escape(name)} ✕</button>'
        for name, members in lists.items()
        if j in members
    )
    star = f'<button data-key="s" name="starred" value="{0 if note.starred else 1}">{"★ starred" if note.starred else "☆ star"}</button>'
    fields = _fields(note.label, note.note, "", f'<datalist id="lists">{names}</datalist><button>Add</button>{inside}')
    # one form, so that no button throws away what stands in another's field; Enter presses the first button, which CSS puts behind the note
    return f'<form method="post" action="{address}" class="editor"><button class="keep">Keep</button>\n{star}\n{fields}</form>'


def _fields(label: str, note: str, list_name: str, beside: str = "") -> str:
    return f"""<label>Label <input data-key="e" name="label" value="{escape(label)}" maxlength="200" size="40"></label>
<label>Note <textarea name="note" rows="{min(6, 1 + note.count(chr(10)))}" cols="50" maxlength="10000">
{escape(note)}</textarea></label>
<span><label>List <input name="list" list="lists" value="{escape(list_name)}" maxlength="100"></label>{beside}</span>"""


def unsaved(j: int, address: str, given: dict[str, str], sentence: str) -> str:
    """The text that was typed and could not be saved, to try again; it does not read the notes, which may be what failed."""
    pressed = "".join(
        f'<input type="hidden" name="{name}" value="{escape(given[name])}">' for name in ("starred", "remove") if name in given
    )
    body = f"""<h1>Feature {j}: not saved</h1>{alert(sentence)}
<form method="post" action="{escape(address)}" class="editor" data-begun><button class="keep">Keep</button>{pressed}
{_fields(given.get("label", ""), given.get("note", ""), given.get("list", ""))}</form><p><a href="/f/{j}">Feature {j} as it is</a></p>"""
    return page(f"Feature {j}: not saved", body)


def lists(browser: "Browser", imported: int | None = None) -> str:
    known = browser.notes.all().values()
    stars, labels = sum(note.starred for note in known), sum(bool(note.label) for note in known)
    rows = "".join(
        f'<tr><td><a href="/?{escape(urlencode({"list": name}))}">{escape(name)}</a></td><td class="num">{len(members):,}</td>'
        f'<td><form method="post" action="/lists"><button name="remove" value="{escape(name)}">remove</button></form></td></tr>\n'
        for name, members in browser.notes.lists().items()
    )
    done = "" if imported is None else f'<p role="status">{imported:,} entries were read.</p>'
    body = f"""<h1>Lists</h1>
<p><a href="/?starred=1">{stars:,} starred</a> · <a href="/?labelled=1&amp;sort=label&amp;up=1">{labels:,} labelled</a></p>
<section class="scroll"><table><thead><tr><th>list</th><th class="num">features</th><th></th></tr></thead>
<tbody>{rows}</tbody></table></section>
<p><a href="/notes.jsonl" download>Export</a> everything as lines of JSON, or
<label>import <input type="file" id="import" accept=".jsonl,.json,application/jsonl"></label></p>
<p id="failure" role="alert" class="refusal" hidden></p>{done}"""
    return page("Lists", body)
