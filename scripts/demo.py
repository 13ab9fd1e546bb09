"""The main job on the bundled model, offline: cache, train, evaluate, index, list, steer. Prints every command before it runs it.

Each command can be typed by hand. An interrupted demo continues where it stopped; `--restart` starts over.
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sae.command_line import run
from sae.dictionaries.formats.saelens.files import WEIGHTS
from sae.disk.checksum import crc32
from sae.disk.places import require_folder

MODEL = Path("checkpoints/demo-lm")
SHIPPED = Path("checkpoints/demo-sae")
# Also how checkpoints/demo-sae was made; its README says so.
TRAINING = (
    "--d-sae 4096 --l1 3 --steps 1300 --batch-size 2048 --lr 3e-3 --resample-every 300 --dead-steps 150 --decoder-norm 0.1 --b-dec mean"
)

SAMPLING = "--temperature 0.9 --top-p 0.95"  # as the model's bundled text was sampled


@dataclass
class DemoConfig:
    out: Path = Path("runs/demo")
    """Folder for everything the demo makes."""
    word: str = "fuck"
    """A word to look for among the features."""
    strengths: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Multiples of the found feature's maximum activation to steer with."""
    restart: bool = False
    """Remove what an earlier demo made."""


def demo(config: DemoConfig) -> None:
    if config.restart:
        shutil.rmtree(config.out, ignore_errors=True)
    require_folder(config.out)
    out = config.out
    cache, dictionary, index, pages = out / "cache", out / "sae", out / "index", out / "pages"
    began = time.monotonic()
    text = MODEL / "tokens.safetensors"
    call("cache_activations", f"--model {MODEL} --text {text} --sites resid_post.2 --tokens 1000000 --out {cache}")
    call("train_sae", f"relu --cache {cache} --out {dictionary} {TRAINING}")
    call("evaluate_sae", f"--dictionary {dictionary} --cache {cache}", makes=dictionary / "evaluation.json")
    call("build_feature_index", f"--dictionary {dictionary} --cache {cache} --tokens 500000 --out {index}", makes=index / "index.json")
    call("list_features", f"--index {index} --search {shlex.quote(config.word)} --top 8 --html {pages}")
    feature = json.loads(call("list_features", f"--index {index} --search {shlex.quote(config.word)} --top 1 --json", show=False))[0]
    number = feature["feature"]
    call("steer", f"--index {index} --feature {number} --strength {config.strengths[0]:g} --prompt 'I think' {SAMPLING}")
    table = out / "steering.json"
    given = " ".join(f"{s:g}" for s in config.strengths)
    call("measure_steering", f"--index {index} --feature {number} --strengths {given} --samples 24 {SAMPLING} --out {table}", makes=table)
    summary(config, number, time.monotonic() - began)


def call(script: str, flags: str, show: bool = True, makes: Path | None = None) -> str:
    """Prints a command as a user would type it and runs it. If it fails, the demo ends with its exit code.

    If the file `makes` exists, the command is skipped: for scripts that cannot resume.
    """
    began = time.monotonic()
    if show:
        print(f"\n$ python scripts/{script}.py {flags}".rstrip(), flush=True)
    if makes is not None and makes.exists():
        print(f"(skipped: {makes} exists)", flush=True)
        return ""
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *shlex.split(flags)]
    with subprocess.Popen(command, stdout=None if show else subprocess.PIPE, text=True) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            said = process.communicate()[0]
        except KeyboardInterrupt:
            process.wait()  # it was interrupted too, and may be writing a checkpoint
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code := process.returncode:
        sys.exit(code if code > 0 else 128 - code)  # as a shell shows the end by a signal
    if show:
        print(f"({time.monotonic() - began:.0f} s)", flush=True)
    return said or ""


def summary(config: DemoConfig, feature: int, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    out = config.out
    rows = json.loads((out / "steering.json").read_text())["rows"]
    table = Table(title=f"The demo took {seconds / 60:.1f} minutes", show_header=False)
    table.add_row("activations", str(out / "cache"))
    table.add_row("dictionary", str(out / "sae"))
    for row in quality(out / "sae" / "evaluation.json"):
        table.add_row(*row)
    table.add_row(f"feature for {config.word!r}", f"{feature}; open {out / 'pages' / 'index.html'} in a browser")
    table.add_row("look at all of them", f". .venv/bin/activate; python scripts/browse_features.py --index {out / 'index'}")
    for row in rows:
        added = "unsteered" if row["direction"] == "none" else f"{row['direction']} x {row['strength']:g}"
        per_thousand = 1000 * row["found"] / max(1, row["words"])
        rate = f"{row['found']} curse words in {row['words']:,} ({per_thousand:.1f} per 1,000), {row['nats_per_token']:.2f} nats per token"
        table.add_row(added, rate)
    if SHIPPED.exists():
        same = crc32(SHIPPED / WEIGHTS) == crc32(out / "sae" / WEIGHTS)
        found = "to the last bit" if same else "in method; bits differ with the processor and its thread count"
        table.add_row(str(SHIPPED), f"the shipped dictionary, the same {found}")
    Console().print(table)


def quality(evaluation: Path) -> list[tuple[str, str]]:
    """Two rows of the summary, from the file that evaluate_sae wrote."""
    measured = json.loads(evaluation.read_text())
    reconstruction, loss = measured["reconstruction"], measured["language_model"]
    low, high = loss["loss_recovered_interval"]
    return [
        ("held-out quality", f"FVU {reconstruction['fvu']:.3f} at L0 {reconstruction['l0']:.1f}"),
        ("loss recovered", f"{loss['loss_recovered']:.3f} ({low:.3f} to {high:.3f})"),
    ]


if __name__ == "__main__":
    run(demo, DemoConfig, __doc__ or "")
