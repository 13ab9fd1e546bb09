"""Features in the terminal: list, search and look at them, and write their pages."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sae.disk.places import require_folder
from sae.errors import InputError
from sae.features.index.reader import Context, FeatureIndex

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(kw_only=True)
class ListConfig:
    index: Path
    """Folder that `sae index` wrote."""
    search: str | None = None
    """List features that fire on a word, or on any of "one|two|three"; case does not matter."""
    promotes: str | None = None
    """List features that make a word more likely (logit lens)."""
    feature: tuple[int, ...] = ()
    """Features to look at; a single one is shown with its contexts."""
    list: Literal["density", "max", "count"] | None = None
    """List features in falling order of a column; max if nothing else is asked for."""
    random: bool = False
    """List features drawn at random from those that fire."""
    seed: int = 0
    """Seed of --random."""
    top: int = 20
    """Number of features to list, or of contexts to show."""
    html: Path | None = None
    """Also write a page for each listed feature into this folder, and index.html."""
    json: bool = False
    """Print JSON instead of a table."""
    verify: bool = False
    """First compare every file's checksum. By default only those of files up to 32 MB are compared."""


def list_features(config: ListConfig) -> None:
    """Raises `InputError` for a feature that does not exist, a word that does not occur, or flags that exclude one another."""
    asked = [name for name in ("search", "promotes", "feature", "list", "random") if getattr(config, name) not in (None, (), False)]
    if len(asked) > 1:
        raise InputError(f"expected one of --search, --promotes, --feature, --list and --random, but got {' and '.join(asked)}")
    if config.top < 1:
        raise InputError(f"expected --top of at least 1, but got {config.top}")
    if config.html is not None:
        require_folder(config.html)
    index = FeatureIndex.open(config.index, verify=config.verify)
    features, found, heading = select(index, config)
    one = len(config.feature) == 1
    if config.json:
        print(json.dumps([feature_facts(index, j, found.get(j), config.top if one else 1) for j in features], indent=1))
    elif one:
        print_feature(index, features[0], config.top, config.seed)
    else:
        print_features(index, features, found, heading)
    if config.html is not None:
        from sae.features.pages.feature import write_pages

        path = write_pages(index, features, config.html, heading)
        if not config.json:
            print(f"open {path}")


def select(index: FeatureIndex, config: ListConfig) -> tuple[list[int], dict[int, Any], str]:
    """The features to list, what the search says about each, and a heading."""
    if config.search is not None:
        firing = index.search(config.search, config.top)
        heading = f"Features that fire on {config.search}" + (f" ({firing[0].occurrences:,} occurrences)" if firing else "")
        return [hit.feature for hit in firing], {hit.feature: hit for hit in firing}, heading
    if config.promotes is not None:
        promoting = index.promotes(config.promotes, config.top)
        return [hit.feature for hit in promoting], {hit.feature: hit for hit in promoting}, f"Features that promote {config.promotes}"
    if config.feature:
        for j in config.feature:
            index.feature(j)
        return list(config.feature), {}, "Features"
    if config.random:
        alive = np.flatnonzero(index.columns["count"])
        drawn = np.random.default_rng(config.seed).permutation(alive)[: config.top]
        return drawn.tolist(), {}, "Random features"
    column = config.list or "max"
    order = np.argsort(-np.asarray(index.columns[column], np.float64), kind="stable")[: config.top]
    return order.tolist(), {}, f"Features by {column}"


def feature_facts(index: FeatureIndex, j: int, hit: Any, n: int) -> dict[str, Any]:
    """One feature as plain JSON values."""
    feature = index.feature(j)
    word = index.vocabulary.spelling
    return {
        "feature": j,
        **{name: feature.columns[name].item() for name in ("density", "count", "max", "mean", "decoder_norm")} | {"max": feature.maximum},
        **({} if hit is None else {name: value for name, value in hit._asdict().items() if name != "feature"}),
        "fires_on": [{"token": word(token), "share": share} for token, share in index.top_tokens(j)],
        "promotes": [{"token": word(token), "value": value} for token, value in index.lens_tokens(j)],
        "suppresses": [{"token": word(token), "value": value} for token, value in index.lens_tokens(j, bottom=True)],
        "contexts": [
            {"position": c.position, "label": c.label, "centre": c.centre, "tokens": c.texts, "values": c.values.tolist()}
            for c in index.top_contexts(j, n)
        ],
    }


def print_features(index: FeatureIndex, features: list[int], found: dict[int, Any], heading: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=heading, title_justify="left", box=None, header_style="bold")
    names = {"FiresOn": ["score", "precision", "recall"], "Promotes": ["value", "lens_rank"]}
    extra = names[type(next(iter(found.values()))).__name__] if found else []
    console = Console()
    wide = console.width >= 120  # a narrow terminal has no room for every column beside the context
    extra = extra if wide else extra[:1]
    for name in ("feature", "density", "max", *(name.replace("_", " ") for name in extra)):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(7, len(name)))
    for name, width in (("fires on", 22), ("promotes", 26))[: 1 + wide]:
        table.add_column(name, max_width=width, min_width=12, no_wrap=True)
    table.add_column("strongest context", no_wrap=True, ratio=1)
    for j in features:
        feature = index.feature(j)
        numbers = [str(j), f"{100 * feature.columns['density']:.3g}%", f"{feature.maximum:.3g}"]
        numbers += [f"{getattr(found[j], name):.3g}" for name in extra]
        words = [
            _plain(" ".join(_clean(index.vocabulary.spelling(t)).strip() for t, _ in tokens))
            for tokens in (index.top_tokens(j, 3), index.lens_tokens(j, 4))
        ]
        contexts = index.top_contexts(j, 1, before=12, after=8)
        table.add_row(*numbers, *words[: 1 + wide], context_text(contexts[0], 24 if wide else 12) if contexts else "")
    console.print(table)


def print_feature(index: FeatureIndex, j: int, n: int, seed: int) -> None:
    """Statistics, tokens and contexts of one feature."""
    from rich.console import Console

    console = Console(highlight=False)
    feature = index.feature(j)
    columns = feature.columns
    console.print(f"Feature {j}", style="bold")
    console.print(
        f"fires on {int(columns['count']):,} of {index.info['tokens_scanned']:,} tokens ({100 * columns['density']:.3g}%), "
        f"maximum {feature.maximum:.3g}, mean {'size ' if index.negative is not None else ''}when firing {columns['mean']:.3g}"
    )
    word = index.vocabulary.spelling
    for name, tokens in (
        ("fires on", [(t, f"{100 * share:.0f}%") for t, share in index.top_tokens(j, 10)]),
        ("promotes", [(t, f"{value:+.2f}") for t, value in index.lens_tokens(j)]),
        ("suppresses", [(t, f"{value:+.2f}") for t, value in index.lens_tokens(j, bottom=True)]),
    ):
        console.print(_plain(f"{name:<11}" + "  ".join(f"'{_clean(word(token))}' {text}" for token, text in tokens)))
    for title, contexts in (("Top activations", index.top_contexts(j, n)), ("Random activations", index.random_contexts(j, n, seed))):
        console.print(f"\n{title}", style="bold")
        half = max(20, (console.width - 26) // 2)
        for context in contexts:
            line = _plain(f"{context.value:8.3g} {(context.label or '')[:15]:<15} ")
            line.append_text(context_text(context, half))
            line.truncate(console.width)
            console.print(line, no_wrap=True)


def context_text(context: Context, left_width: int | None = None) -> "Text":
    """A context on one line, the firing token bold and underlined; with `left_width`, it begins in that column."""
    left = _clean("".join(context.texts[: context.centre]))
    centre = _clean(context.texts[context.centre])
    rest = context.texts[context.centre + 1 :]
    while not centre and rest:  # the first bytes of a character that a later token completes
        centre, rest = _clean(rest[0]), rest[1:]
    text = _plain(left if left_width is None else left[-left_width:].rjust(left_width))
    text.append(centre, style="bold underline")
    return text.append(_clean("".join(rest)))


def _plain(text: str) -> "Text":
    from rich.text import Text

    return Text(text)  # no markup: "[red]" in a corpus is text


def _clean(text: str) -> str:
    """Line breaks as a mark, other control characters as pictures: a corpus must not steer the terminal."""
    return "".join("↵" if c == "\n" else c if c.isprintable() else chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd" for c in text)
