"""Make the pictures of the README and the docs: pages of the browser in headless Chromium, and plots of the demo and the studies."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.command_line import run
from sae.disk.places import require_folder
from sae.disk.reading import read_json
from sae.disk.writing import atomic
from sae.errors import InputError
from sae.features.index.reader import FeatureIndex

SAMPLING = "&max_new_tokens=60&temperature=0.9&top_p=0.95"
REAL_TEXT = "The+band+played+music+in+the+church+by+the+river+until+the+police+said+that+the+war+was+over."


@dataclass
class PicturesConfig:
    demo: Path | None = Path("runs/demo")
    """Folder of the demo's results. Default: its pictures stay as they are."""
    real: Path | None = None
    """Folder of the real model's demo with one dictionary, such as runs/demo-real/shipped; its pictures are real_*.png. Default: they stay
    as they are."""
    real_word: str = "God"
    """Word whose feature in the real model's demo is shown."""
    comparison: Path | None = None
    """Folder of a comparison (sae compare) whose report becomes comparison.png. Default: that picture stays as it is."""
    real_comparison: Path | None = None
    """The same of the real model, for real_comparison.png."""
    breakdown: tuple[Path, ...] = ()
    """Folders of breakdown studies (sae study-breakdown), which become breakdown.png. Default: that picture stays as it is."""
    circuit: Path | None = None
    """Page of a circuit (sae find-circuit), whose drawing becomes circuit.png. Default: that picture stays as it is."""
    out: Path = Path("docs/pictures")
    """Folder for the pictures."""
    chromium: str = "chromium"
    """Command or path of the browser."""


def make_pictures(config: PicturesConfig) -> None:
    require_folder(config.out)
    if config.breakdown:
        plot_breakdown([read_json(folder / "study.json", "a breakdown study") for folder in config.breakdown], config.out / "breakdown.png")
    if config.circuit is not None:
        picture_of_circuit(config, config.circuit)
    if config.comparison is not None:
        picture_of_comparison(config, config.comparison, "comparison.png")
    if config.real_comparison is not None:
        picture_of_comparison(config, config.real_comparison, "real_comparison.png")
    if config.real is not None:
        pictures_of_real_demo(config, config.real)
    if config.demo is not None:
        pictures_of_demo(config, config.demo)


def pictures_of_real_demo(config: PicturesConfig, real: Path) -> None:
    """Takes the pictures of the first feature that the index finds for the word."""
    feature = FeatureIndex.open(real / "index").search(config.real_word, 1)[0].feature
    with browser(real / "index") as url, camera(config) as take:
        take("real_feature.png", f"{url}/f/{feature}", height=1250)
        take("real_prompt.png", url + "/prompt?order=effect&text=" + REAL_TEXT)


def picture_of_comparison(config: PicturesConfig, comparison: Path, name: str) -> None:
    report = comparison / "report.html"
    if not report.exists():
        raise InputError(f"expected a comparison in {comparison}, found no {report.name}; run sae compare first")
    with camera(config) as take:
        take(name, report.resolve().as_uri(), height=1238)


def pictures_of_demo(config: PicturesConfig, demo: Path) -> None:
    table = demo / "steering.json"
    if not table.exists():
        raise InputError(f"expected the demo's results in {demo}, found no {table.name}; run make demo first")
    result = json.loads(table.read_text())
    with browser(demo / "index") as url:
        screenshots(config, url, result["feature"])
    plot(result, config.out / "steering.png")


def chromium_of(config: PicturesConfig) -> str:
    chromium = shutil.which(config.chromium)
    if chromium is None:
        raise InputError(f"expected the browser {config.chromium!r}, which is not installed; give another with --chromium")
    return chromium


def picture_of_circuit(config: PicturesConfig, circuit: Path) -> None:
    """Takes a picture of the page's first section: filters, legend, drawing."""
    if not circuit.exists():
        raise InputError(f"expected the page of a circuit at {circuit}, which does not exist; run sae find-circuit first")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=chromium_of(config), args=["--no-sandbox", "--hide-scrollbars"])
        page = window.new_page(viewport={"width": 1280, "height": 900})
        page.goto(circuit.resolve().as_uri())
        with atomic(config.out / "circuit.png") as temporary:
            temporary.write_bytes(page.locator("section").first.screenshot())
        window.close()
    print(config.out / "circuit.png")


@contextmanager
def browser(index: Path) -> Iterator[str]:
    """Serves the feature browser on a free port; yields its URL."""
    command = [sys.executable, str(Path(__file__).with_name("browse_features.py")), "--index", str(index), "--port", "0", "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = (line for line in process.stdout if "http://" in line)
        try:
            line = next(lines, None)
            if line is None:
                raise InputError(f"expected the feature browser of {index} to start, but it ended; run this where the demo ran")
            yield "http://" + line.split("http://")[1].split("/")[0]
        finally:
            process.terminate()


@contextmanager
def camera(config: PicturesConfig) -> Iterator[Any]:
    """Yields a function that saves a picture of a URL under a file name, after `act` did something on the page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=chromium_of(config), args=["--no-sandbox", "--hide-scrollbars"])
        page = window.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(180_000)  # a real model takes a while for a prompt's effects

        def take(name: str, address: str, act: Any = None, height: int = 900) -> None:
            page.set_viewport_size({"width": 1280, "height": height})
            page.goto(address)
            if act is not None:
                act(page)
            with atomic(config.out / name) as temporary:
                temporary.write_bytes(page.screenshot())
            print(config.out / name)

        yield take
        window.close()


def write_texts(page: Any) -> None:
    page.get_by_role("button", name="Write").click()
    page.locator("#run:enabled").wait_for()
    page.get_by_text("measuring how far it works").wait_for(state="hidden")


def screenshots(config: PicturesConfig, url: str, feature: int) -> None:
    with camera(config) as take:
        take("features.png", url + "/?q=fuck%7Cshit&how=fires")
        take("steer.png", f"{url}/steer?feature={feature}&strength=1&prompt=I+think" + SAMPLING, write_texts, height=580)


def plot(result: dict, picture: Path) -> None:
    """Plots the rate of the counted words and readability against strength; the random direction has the feature's norm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    none = next(row for row in result["rows"] if row["direction"] == "none")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, colour in (("feature", "#1b7f5c"), ("random", "#8a8a8a")):
        rows = [none, *(row for row in result["rows"] if row["direction"] == name)]
        strengths = [row["strength"] for row in rows]
        rates = [1000 * row["found"] / max(1, row["words"]) for row in rows]
        errors = [[max(0.0, side * (rate - 1000 * row["interval"][i])) for row, rate in zip(rows, rates)] for i, side in ((0, 1), (1, -1))]
        label = f"feature {result['feature']}" if name == "feature" else "random direction"
        left.errorbar(strengths, rates, errors, color=colour, marker="o", capsize=3, label=label)
        right.plot(strengths, [row["nats_per_token"] for row in rows], color=colour, marker="o", label=label)
    left.set(xlabel="strength (multiples of maximum activation)", ylabel="curse words per 1,000 words")
    right.set(xlabel="strength (multiples of maximum activation)", ylabel="nats per token, unsteered model")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(picture) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    print(picture)


ARMS = (
    *("rotated", "lengthened", "norms frozen", "patterns frozen", "values frozen", "patterns, values frozen"),
    *("norms, patterns, values frozen", "random", "front", "last"),
)
COLOURS = ("#1b7f5c", "#c2571a", "#3d5fb3", "#8a8a8a")


def plot_breakdown(studies: list[dict[str, Any]], picture: Path) -> None:
    """Plots, at each model's middle site, what each arm restores at the wall, and where the wall is for each kind of direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained", width_ratios=(3, 2))
    kinds = ("feature", "diffmean", "pca", "random")
    for number, (study, colour) in enumerate(zip(studies, COLOURS)):
        site, found = max(study["summary"]["sites"].items(), key=lambda item: item[1]["directions"])  # where the features are
        label, shift = f"{Path(study['model']).name}, {site}", (number - (len(studies) - 1) / 2) * 0.22
        for axes, names, estimates in (
            (left, ARMS, found["restored"]),
            (right, kinds, {kind: wall["median"] for kind, wall in found["walls"].items()}),
        ):
            rows = [(y + shift, estimates[name]) for y, name in enumerate(names) if estimates.get(name, {}).get("value") is not None]
            values = [one["value"] for _, one in rows]
            ends = [[max(0.0, one["value"] - one["low"]) for _, one in rows], [max(0.0, one["high"] - one["value"]) for _, one in rows]]
            axes.errorbar(values, [y for y, _ in rows], xerr=ends, fmt="o", markersize=4, capsize=2, color=colour, label=label)
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis() if number == 0 else None
    left.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    left.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    left.set(xlabel="share of the damage restored at the wall (1 all, 0 none, below 0 it breaks more)", xlim=(-2, 1.1))
    right.set(xlabel="rho at the wall (KL 1 nat)", xlim=(0, None))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(studies), frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(picture) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    print(picture)


if __name__ == "__main__":
    run(make_pictures, PicturesConfig, __doc__ or "")
