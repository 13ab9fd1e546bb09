"""The comparison of directions as one self-contained HTML page: no network, no script, every text escaped.

`report_html` takes the dictionary that comparison.json holds (steering/compare/command.py) and looks nothing up by itself.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from sae.html import document, figure, visible
from steering.compare.report_plot import Series, marker, pareto_svg, series_of, whisker_svg
from steering.report_style import STYLE
from steering.strength.measure import listed_words

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SHOWN = 3  # prompts of the sample texts

Result = dict[str, Any]


def report_html(result: Result) -> str:
    """The whole page. The same result gives the same page, byte for byte."""
    name = result["concept"]["name"]
    series = series_of(result["arms"])
    body = "\n".join(
        [
            _head(result),
            _verdict(result["verdict"]),
            _pareto(result, series),
            _table(result, series),
            _ranges(result["arms"]),
            _left_out(result["arms"]),
            _samples(result),
            _cosines(result["cosines"]),
            _all_levels(result),
            _settings(result),
        ]
    )
    isolate = "".join(
        f".pareto:has(.l{i}:hover) .series:not(.s{i}),.pareto:has(.l{i}:focus) .series:not(.s{i}){{opacity:.09}}"
        for i in range(len(series))
    )
    return document(f"Steering towards {name}", body, STYLE + isolate, POLICY)


def estimate_cell(value: dict[str, float] | None, signed: bool = False) -> str:
    """A mean over its 95 % interval, for a cell."""
    if value is None:
        return "–"
    return f"{figure(value['value'], signed)}<small>{figure(value['low'], signed)} to {figure(value['high'], signed)}</small>"


def best_level(arm: dict[str, Any]) -> dict[str, Any] | None:
    """The level that was chosen on one half of the prompts."""
    if arm["best"] is None:
        return None
    return next((level for level in arm["levels"] if level["budget"] == arm["best"]["budget"]), None)


def _budget(level: dict[str, Any]) -> str:
    return "–" if level["budget"] is None else f"{level['budget']:g}"


def _head(result: Result) -> str:
    concept, target = result["concept"], result["target"]
    facts = {"model": result["model"], "site": result["site"], "dictionary": result["dictionary"] or "none", "seed": result["seed"]}
    second = result.get("second_target")
    scores = [("Target score", target)] + ([("Beside it", second)] if second else [])
    scored = "".join(
        f"<p><b>{what}:</b> {escape(score['describe'])} "
        f"<span class='soft'>(AUROC on held-out texts: {figure(score['held_out_auroc'])})</span></p>"
        for what, score in scores
    )
    pairs = "".join(f"<div><dt>{key}</dt><dd>{escape(str(value))}</dd></div>" for key, value in facts.items())
    description = concept.get("description") or ""
    return f"<h1>Steering towards {escape(concept['name'])}</h1><p>{escape(description)}</p>{scored}<dl class='facts'>{pairs}</dl>"


def _verdict(sentences: Sequence[str]) -> str:
    def kind(sentence: str) -> str:
        return "no" if "no evidence" in sentence else "yes" if " steers towards " in sentence else "note"

    items = "".join(f'<li class="{kind(sentence)}">{escape(sentence)}</li>' for sentence in sentences)
    return f"<section class='verdict'><h2>Verdict</h2><ul>{items}</ul></section>"


def _pareto(result: Result, series: Sequence[Series]) -> str:
    legend = "".join(
        f'<li class="l{s.number}" tabindex="0" style="--c:{s.colour}"><svg viewBox="0 0 24 16" class="series" aria-hidden="true">'
        f"{marker(s.shape, 12, 8)}</svg><span>{escape(s.method)}</span></li>"
        for s in series
    )
    return (
        "<section><h2>What is gained, and what it costs</h2><p class='soft'>Gain in the target score over no steering on the same prompts, "
        "against how far the model's predictions on off-topic text have moved. Up and to the left is better. Bars are 95 % intervals over "
        "prompts, the band is that of the controls; points that would cover each other are set apart a little. Hollow points did not reach "
        "their budget; ringed ones lie beyond their direction's working range. Point at a name to see it alone.</p>"
        f'<div class="pareto">{pareto_svg(series, result["target"]["kind"])}<ul class="legend">{legend}</ul></div></section>'
    )


def _table(result: Result, series: Sequence[Series]) -> str:
    second = bool(result.get("second_target"))
    heads = ["method", "gain, 95 %", "", "target", *["beside it"] * second, "detection AUROC", "budget, nats", "nats per token"]
    heads += ["distinct-2", "longest repeat", "off-topic KL", "top-1 flips"]
    scored = [(arm, level) for arm in result["arms"] if (level := best_level(arm)) is not None and level["score"] is not None]
    scored.sort(key=lambda pair: -pair[1]["score"]["gain"]["value"])
    gains = [level["score"]["gain"] for _, level in scored]
    span = (min((g["low"] for g in gains), default=0.0), max((g["high"] for g in gains), default=1.0))
    control = [level["score"]["gain"] for arm, level in scored if arm["kind"] == "control"]
    colour = {s.method: s.colour for s in series}
    rows = []
    for arm, level in scored:
        gain, score = level["score"]["gain"], level["score"]
        note = f'<span class="soft">{escape(arm["note"])}</span>' if arm["note"] else ""
        budget = _budget(level) + ("" if level["reached"] else "<small>not reached</small>") + _beyond(level)
        estimates = [score["target"], *[score["second_target"]] * second, arm["detection_auroc"]]
        cells = [*map(estimate_cell, estimates), budget, estimate_cell(level["nats_per_token"])]
        cells += [figure(level[name]) for name in ("distinct_2", "longest_repeat", "off_topic_kl", "top1_flips")]
        rows.append(
            f'<tr class="{escape(arm["kind"])}"><td class="m">{escape(arm["method"])}{note}</td>'
            f'<td class="n">{estimate_cell(gain, True)}</td>'
            f'<td class="w" style="--c:{colour.get(arm["method"], "var(--baseline)")}">{whisker_svg(gain, span, control)}</td>'
            + "".join(f'<td class="n">{cell}</td>' for cell in cells)
            + "</tr>"
        )
    head = "".join(f'<th class="{"n" if i not in (0, 2) else ""}">{text}</th>' for i, text in enumerate(heads))
    return (
        "<section><h2>Each method at its best budget</h2><p class='soft'>The budget is the one with the highest gain on one half of the "
        "prompts; every number here is of the other half. The grey band is the interval of the controls.</p>"
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _beyond(level: dict[str, Any]) -> str:
    return '<small class="beyond">beyond its range</small>' if level["beyond_working_range"] else ""


def _ranges(arms: Sequence[dict[str, Any]]) -> str:
    """Up to which strength each direction works, and the effect beyond it."""
    rows = []
    for arm in arms:
        works = arm["working_range"]
        if works is None:
            continue
        if works["coefficient"] is None:
            end, beyond = f"over {figure(works['tried'])}", "no sign of breaking up to there"
        else:
            end = f"{figure(works['coefficient'])}<small>ρ {figure(works['coefficient'] * works['rho_of_1'])}</small>"
            beyond = works["beyond"]
        unusual = "–" if works["unusual"] is None else figure(works["unusual"])
        outside = ", ".join(_budget(level) for level in arm["levels"] if level["beyond_working_range"]) or "none"
        rows.append(
            f'<tr><td class="m">{escape(arm["method"])}</td><td class="n">{end}</td><td>{escape(beyond)}</td><td class="n">{unusual}</td>'
            f'<td class="n">{outside}</td></tr>'
        )
    without = "".join(
        f"<p class='soft'>Without a working range: {escape(arm['method'])}, {escape(arm['no_working_range'])}</p>"
        for arm in arms
        if arm["no_working_range"]
    )
    if not rows and not without:
        return ""
    heads = ("method", "works up to", "beyond it", "unlike plain text from", "budgets beyond it")
    head = "".join(f'<th class="{"" if i in (0, 2) else "n"}">{text}</th>' for i, text in enumerate(heads))
    return (
        "<section><h2>How far each direction works</h2><p class='soft'>The largest coefficient before the first sign that the text will "
        "break, measured on neutral sentences, and what holds beyond it. From the next coefficient on, most tokens are further from "
        "neutral text than 99 % of its own, which text survives. The last column names the budgets beyond the range.</p>"
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{without}</section>"
    )


def _left_out(arms: Sequence[dict[str, Any]]) -> str:
    items = "".join(f"<li><b>{escape(arm['method'])}</b>: {escape(arm['left_out'])}</li>" for arm in arms if arm["left_out"])
    failed = "".join(
        f"<li><b>{escape(arm['method'])}</b> at {_budget(level)} nats: {escape(level['failure'])}</li>"
        for arm in arms
        for level in arm["levels"]
        if level["failure"]
    )
    if not items and not failed:
        return ""
    return f"<section><h2>Left out or without text</h2><ul>{items}{failed}</ul></section>"


def _samples(result: Result) -> str:
    """Every arm's first continuations of the same prompts: weakest and strongest budget, and the strength that breaks the text."""
    pattern = listed_words(result["concept"]["words"]) if result["concept"].get("words") else None
    broken = {entry["method"]: entry for entry in result["broken"]}
    blocks = []
    for i, arm in enumerate(arm for arm in result["arms"] if arm["levels"]):
        levels = arm["levels"][:1] + arm["levels"][-1:] * (len(arm["levels"]) > 1)
        columns = [(_strength(level), level, "") for level in levels]
        if arm["method"] in broken:
            columns.append((_strength(broken[arm["method"]], "breaking: "), broken[arm["method"]], "broken"))
        prompts = _shared_prompts([level for _, level, _ in columns])
        cells = []
        for column, (title, level, mark) in enumerate(columns, 1):
            texts = [_sample(level, prompt, pattern) for prompt in prompts if level["texts"]]
            texts = texts or [f'<span class="none">{escape(level.get("failure") or "no text was kept")}</span>']
            cells.append(f'<h3 class="{mark}" style="--column:{column};--row:1">{title}</h3>')
            cells += [f'<p style="--column:{column};--row:{row}">{text}</p>' for row, text in enumerate(texts, 2)]
        blocks.append(
            f"<details{' open' if i < 2 or arm is _best(result['arms']) else ''}><summary>{escape(arm['method'])}</summary>"
            f'<div class="samples" style="--columns:{len(columns)}">{"".join(cells)}</div></details>'
        )
    marked = " Listed words are marked." if pattern else ""
    return (
        "<section><h2>What it reads like</h2><p class='soft'>The first continuation of the first prompts, the same for every method, "
        "none picked: at the smallest and the largest budget, and far beyond, where text breaks."
        f"{marked} All continuations are in comparison.json.</p>{''.join(blocks)}</section>"
    )


def _best(arms: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    able = [arm for arm in arms if arm["kind"] == "method" and arm["best"]]
    return max(able, key=lambda arm: arm["best"]["gain"]["value"], default=None)


def _shared_prompts(levels: Sequence[dict[str, Any]]) -> list[str]:
    """The first prompts that every level with texts has continued."""
    sets = [dict.fromkeys(text["prompt"] for text in level["texts"]) for level in levels if level["texts"]]
    return [prompt for prompt in sets[-1] if all(prompt in other for other in sets)][:SHOWN] if sets else []


def _strength(level: dict[str, Any], before: str = "") -> str:
    if not level["coefficient"]:
        return "without a direction"
    rho = f", ρ {figure(level['rho'])}" if level.get("rho") is not None else ""
    reached = "" if level.get("reached", True) else " (not reached)"
    return f"{before}{_budget(level)} nats{reached}, coefficient {figure(level['coefficient'])}{rho}"


def _sample(level: dict[str, Any], prompt: str, pattern: Any) -> str:
    text = next(text for text in level["texts"] if text["prompt"] == prompt)
    pieces, end = [], 0
    for found in pattern.finditer(text["text"]) if pattern else ():
        pieces += [visible(text["text"][end : found.start()]), f"<mark>{visible(found[0])}</mark>"]
        end = found.end()
    score = f' <span class="t">target {figure(text["target"])}</span>' if text.get("target") is not None else ""
    return f"<b>{visible(prompt)}</b>{''.join(pieces)}{visible(text['text'][end:])}{score}"


def _cosines(cosines: dict[str, Any]) -> str:
    methods, matrix = cosines["methods"], cosines["matrix"]
    if len(methods) < 2:
        return ""

    def cell(value: float | None, same: bool) -> str:
        if same or value is None:
            return "<td>·</td>" if same else "<td>–</td>"
        hue = "--pos" if value >= 0 else "--neg"
        return f'<td style="background:rgb(var({hue})/{0.75 * min(1, abs(value)):.2f})">{f"{value:+.2f}".replace("-", "−")}</td>'

    heads = "".join(f'<th scope="col" title="{escape(method)}">{i + 1}</th>' for i, method in enumerate(methods))
    rows = "".join(
        f'<tr><th scope="row">{i + 1} {escape(method)}</th>' + "".join(cell(value, i == j) for j, value in enumerate(row)) + "</tr>"
        for i, (method, row) in enumerate(zip(methods, matrix))
    )
    return (
        "<section><h2>How alike the directions are</h2><p class='soft'>Cosines between those that live at the one site; random ones are "
        "near 0.</p>"
        f'<div class="scroll"><table class="cos"><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _all_levels(result: Result) -> str:
    heads = [
        "method",
        "budget",
        "KL there",
        "off-topic KL",
        "coefficient",
        "ρ",
        "max. activations",
        "gain, choosing half",
        "gain, scoring half",
    ]
    heads += ["target", "nats per token", "distinct-2", "longest repeat", "top-1 flips"]
    rows = []
    for arm in result["arms"]:
        for level in arm["levels"]:
            choose, score = level["choose"] or {}, level["score"] or {}
            reached = "" if level["reached"] else "<small>not reached</small>"
            cells = [_budget(level), figure(level["kl"]) + reached]
            cells += [figure(level.get(key)) for key in ("off_topic_kl", "coefficient", "rho", "max_activations")]
            cells[3] += _beyond(level)
            cells += [figure(choose.get("gain"), True), estimate_cell(score.get("gain"), True), estimate_cell(score.get("target"))]
            cells += [
                estimate_cell(level["nats_per_token"]),
                figure(level["distinct_2"]),
                figure(level["longest_repeat"]),
                figure(level["top1_flips"]),
            ]
            chosen = ' class="chosen"' if level is best_level(arm) and len(arm["levels"]) > 1 else ""
            name = escape(arm["method"]) + (f"<small>{escape(level['failure'])}</small>" if level["failure"] else "")
            rows.append(f'<tr{chosen}><td class="m">{name}</td>' + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>")
    head = "".join(f'<th class="{"n" if i else ""}">{text}</th>' for i, text in enumerate(heads))
    return (
        "<section><details><summary>Every budget of every method</summary><p class='soft'>Shaded: the budget that was chosen. ρ is the "
        "length of what is added over the median length of an activation at the site.</p>"
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details></section>"
    )


def _settings(result: Result) -> str:
    settings = dict(result["settings"])
    command = settings.pop("command", None)
    concept = {key: value for key, value in result["concept"].items() if value and key not in ("name", "description")}
    command_line = f"<pre>{escape(command)}</pre>" if command else ""
    return (
        f"<section><h2>How it was made</h2>{command_line}<details><summary>Settings</summary>{_pairs(settings)}</details>"
        f"<details><summary>The concept</summary>{_pairs(concept)}</details></section>"
    )


def _pairs(values: dict[str, Any]) -> str:
    def plain(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {plain(entry)}" for key, entry in value.items())
        if isinstance(value, list | tuple):
            return " · ".join(" / ".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry) for entry in value)
        return "none" if value is None else str(value)

    items = "".join(f"<dt>{escape(str(key)).replace('_', ' ')}</dt><dd>{visible(plain(value))}</dd>" for key, value in values.items())
    return f'<dl class="pairs">{items}</dl>'
