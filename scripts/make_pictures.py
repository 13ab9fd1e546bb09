"""Make the pictures of the README from what `make demo` left: a feature page in headless Chromium, and a plot of steering strengths."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sae.command_line import run
from sae.errors import InputError


@dataclass
class PicturesConfig:
    demo: Path = Path("runs/demo")
    """folder of the demo's results"""
    out: Path = Path("docs/pictures")
    """where the pictures go"""
    chromium: str = "chromium"
    """command or path of the browser"""


def make_pictures(config: PicturesConfig) -> None:
    table = config.demo / "steering.json"
    if not table.exists():
        raise InputError(f"expected the demo's results in {config.demo}, found no {table.name}; run make demo first")
    result = json.loads(table.read_text())
    config.out.mkdir(parents=True, exist_ok=True)
    screenshot(config, config.demo / "pages" / f"{result['feature']}.html", config.out / "feature.png")
    plot(result, config.out / "steering.png")


def screenshot(config: PicturesConfig, page: Path, picture: Path) -> None:
    if not shutil.which(config.chromium):
        raise InputError(f"expected the browser {config.chromium!r}, which is not installed; give another with --chromium")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --hide-scrollbars"
    quiet = "--disable-component-update --disable-sync --window-size=1280,900"
    with tempfile.TemporaryDirectory() as profile:
        command = [config.chromium, *flags.split(), *quiet.split(), f"--user-data-dir={profile}", f"--screenshot={picture}"]
        subprocess.run([*command, page.resolve().as_uri()], check=True, stderr=subprocess.DEVNULL, timeout=120)
    print(picture)


def plot(result: dict, picture: Path) -> None:
    """Rate of the counted words and readability against strength; the random direction has the feature's norm."""
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
    figure.savefig(picture, dpi=140)
    print(picture)


if __name__ == "__main__":
    run(make_pictures, PicturesConfig, __doc__ or "")
