"""The main job on a real language model, SmolLM2-135M: fetch, cache, train, evaluate, index, list, steer, compare. Prints every command
before it runs it.

Only fetching needs a network, once. An interrupted demo continues where it stopped, inside a phase too: what the model has
computed is kept every ten seconds, training every 100 steps, the comparison arm by arm. `--restart` starts over.
"""

import json
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from demo import call, quality

from sae.command_line import run
from sae.dictionaries.dictionary import Dictionary
from sae.disk.places import require_folder
from sae.errors import InputError
from steering.strength.neutral import PROMPTS

MODEL = Path("runs/models/smollm2")
TEXT = Path("checkpoints/smollm2-text/tokens.safetensors")
SHIPPED = Path("checkpoints/smollm2-sae")
SITE = "resid_post.15"
TRAINING = "batchtopk --k 32 --d-sae 4096 --steps 1100 --batch-size 512 --lr 2e-3 --dead-steps 200 --checkpoint-every 100"  # two passes


@dataclass
class RealDemoConfig:
    dictionary: str = "train"
    """"train" trains one, "shipped" takes checkpoints/smollm2-sae; or the folder of another."""
    out: Path = Path("runs/demo-real")
    """Folder for everything the demo makes; each dictionary's results get their own folder in it."""
    word: str = "God"
    """A word to look for among the features."""
    concept: str = "bible"
    """Concept of the comparison at equal KL, which includes the feature found for the word."""
    strength: float = 0.8
    """Multiple of the feature's maximum activation to steer with."""
    prompt: str = "The most important thing in life is"
    """Prompt that the steered model continues."""
    restart: bool = False
    """Remove what an earlier demo made with this dictionary."""


def demo(config: RealDemoConfig) -> None:
    """Raises `InputError` for a dictionary that does not exist or is of another model."""
    own = config.dictionary == "train"
    out = config.out / Path(config.dictionary).name
    if config.restart:
        shutil.rmtree(out, ignore_errors=True)
    require_folder(out)
    began = time.monotonic()
    cache, index, pages, evaluation, comparison = (out / name for name in ("cache", "index", "pages", "evaluation.json", "comparison"))
    dictionary, site = (out / "sae", SITE) if own else given(config.dictionary)
    tokens = 300_000 if own else 60_000  # enough to index
    call("fetch_real_model", "")
    call("cache_activations", f"--model {MODEL} --text {TEXT} --sites {site} --tokens {tokens} --out {cache}")
    if own:
        call("train_sae", f"{TRAINING} --cache {cache} --out {dictionary}")
    both = f"--dictionary {dictionary} --cache {cache}"
    call("evaluate_sae", f"{both} --sequences 40 --out {evaluation}", makes=evaluation)
    call("build_feature_index", f"{both} --out {index}", makes=index / "index.json")
    search = f"--index {index} --search {shlex.quote(config.word)}"
    call("list_features", f"{search} --top 8 --html {pages}")
    number = json.loads(call("list_features", f"{search} --top 1 --json", show=False))[0]["feature"]
    prompt = shlex.quote(config.prompt)
    call("steer", f"--index {index} --feature {number} --strength {config.strength:g} --prompt {prompt} --temperature 0.8 --top-p 0.9")
    compared = f"--model {MODEL} --dictionary {dictionary} --text {TEXT} --concept {shlex.quote(config.concept)} --feature {number}"
    settings = f"--budgets 0.3 --samples 2 --max-new-tokens 24 --prompts {shlex.join(PROMPTS[:16])}"
    call("compare_directions", f"{compared} {settings} --out {comparison}", makes=comparison / "comparison.json")
    summary(config, out, number, evaluation, time.monotonic() - began)


def given(name: str) -> tuple[Path, str]:
    """The folder and the site of a given dictionary."""
    folder = SHIPPED if name == "shipped" else Path(name)
    if not folder.is_dir():
        expected = f'expected --dictionary to be "train", "shipped" or a folder, got {name!r}'
        raise InputError(f"{expected}, and {folder} does not exist; check its path")
    dictionary = Dictionary.load(str(folder))
    if dictionary.site is None:
        raise InputError(f"expected a dictionary that names its site, got {folder}, which does not; give one of {MODEL}")
    return folder, dictionary.site


def summary(config: RealDemoConfig, out: Path, feature: int, evaluation: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"The demo took {seconds / 60:.1f} minutes", show_header=False)
    for row in quality(evaluation):
        table.add_row(*row)
    table.add_row(f"feature for {config.word!r}", f"{feature}; open {out / 'pages' / 'index.html'} in a browser")
    table.add_row("look at all of them", f". .venv/bin/activate; python scripts/browse_features.py --index {out / 'index'}")
    table.add_row("comparison at equal KL", str(out / "comparison" / "report.html"))
    Console().print(table)


if __name__ == "__main__":
    run(demo, RealDemoConfig, __doc__ or "")
