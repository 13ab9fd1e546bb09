"""A wide dictionary on a small machine: opening it and steering with one feature, one feature's page, an index of a small cache.

A random JumpReLU dictionary in bfloat16, of which about `--l0` features fire on a token, is written into its own folder in `--work`
and removed at the end, with a random model of its width (one layer, 512 tokens) and a cache of that model's activations.
`--features 1048576 --width 2304` needs 10 GB of disk, and 3 GB more for its index.

Every part is measured in its own process, with the dictionary's file and the index out of the page cache:
steer: `Dictionary.load`, the feature's direction, and a pass of the model over a few tokens while the feature is clamped.
index: `build_index` of all tokens of the cache.
page: the index opened, its dictionary found to be the same, and the HTML of one feature, then of 20 others.

"own" is the peak of memory that is the process's alone, beyond what it had with libraries and model loaded; "resident" is the peak of all
of it, with libraries, model and the pages of mapped files, which the system takes back when it needs them; "read" is from the disk.
`--code` measures another checkout's code, to set the state before a change beside the state after it.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from disk import forget

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "checkpoints" / "demo-lm"
SITE = "resid_post.0"
FEATURE = 12_345
VOCABULARY = 512
"""so that little of the time goes into the logit lens"""
ROWS = 1 << 14
"""of random numbers at a time"""

Part = Literal["steer", "index", "page"]


@dataclass(kw_only=True)
class BenchmarkConfig:
    features: int = 1 << 20
    width: int = 2304
    tokens: int = 3000
    """of the cache that is indexed"""
    l0: int = 50
    parts: tuple[Part, ...] = ("steer", "index", "page")
    """page needs index"""
    code: Path = ROOT
    """checkout whose code is measured"""
    threads: int = 2
    work: Path = Path("runs")
    """where the files are made and removed"""


def benchmark(config: BenchmarkConfig) -> None:
    from sae.disk.writing import require_free_space
    from sae.errors import InputError

    if min(config.features, config.width, config.tokens, config.l0) < 1 or config.l0 >= config.features:
        raise InputError("expected sizes of at least 1 and fewer active features than there are, got others; give other sizes")
    config.work.mkdir(parents=True, exist_ok=True)
    size = 4 * config.features * config.width
    require_free_space(config.work, int(1.1 * size) + 4000 * config.features, "a synthetic dictionary with its index")
    with tempfile.TemporaryDirectory(dir=config.work) as name:
        folder = Path(name).resolve()
        print(f"writing a model, a cache and a dictionary of {size / 1e9:.1f} GB", file=sys.stderr)
        write_model(folder / "model", config.width)
        write_cache(folder, config.tokens)
        write_dictionary(folder, config)
        print(f"{config.features:,} features, width {config.width:,}, bfloat16, {size / 1e9:.2f} GB; {config.tokens:,} tokens")
        print("| part | seconds | own, MB | resident, MB | read, MB |\n|---|---|---|---|---|")
        for part in config.parts:
            forget([path for inside in (folder / "sae", folder / "index") if inside.exists() for path in inside.iterdir()])
            settings = {"part": part, "folder": str(folder), "threads": config.threads, "feature": min(FEATURE, config.features - 1)}
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(config.code.resolve())}
            command = [sys.executable, __file__, "measure", json.dumps(settings)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
            if done.returncode:
                raise InputError(f"the process that measured {part} ended with code {done.returncode}; its message is above")
            for name, numbers in json.loads(done.stdout.splitlines()[-1]).items():
                row = " | ".join(f"{numbers[key]:,.0f}" for key in ("own", "resident", "read"))
                print(f"| {name} | {numbers['seconds']:.2f} | {row} |", flush=True)


def write_model(folder: Path, width: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from sae.disk.reading import read_tensors

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, n_positions=128, n_embd=width, n_layer=1, n_head=1, n_inner=8)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    ids_n = read_tensors(DEMO / "tokens.safetensors", "the demo's text")[0]["ids"]
    text = AutoTokenizer.from_pretrained(DEMO).decode(ids_n[:100_000].tolist())
    (folder / "text.txt").write_text(text, encoding="utf-8")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>"]
    bpe.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[0], eos_token=special[0]).save_pretrained(folder)


def write_cache(folder: Path, tokens: int) -> None:
    from sae.activations.harvest.command import HarvestConfig, harvest

    text = (str(folder / "model" / "text.txt"),)
    harvest(HarvestConfig(text=text, out=folder / "cache", model=str(folder / "model"), sites=(SITE,), tokens=tokens, device="cpu"))


def write_dictionary(folder: Path, config: BenchmarkConfig) -> None:
    """A SAELens folder written row by row, so that this process stays small; pre-activations are normal, of the activations' own size."""
    from sae.activations.cache import ActivationCache
    from sae.dictionaries.dictionary import Dictionary
    from sae.dictionaries.gates import Threshold

    f, d = config.features, config.width
    cache = ActivationCache.open(folder / "cache", SITE)
    theta = threshold(torch.cat([cache.read(shard)[0] for shard in cache.shards("train")]).double().norm(dim=1) * d**-0.5, config.l0 / f)
    metadata = {"site": SITE, "model_name": str(folder / "model"), "model_fingerprint": cache.manifest["model"]["fingerprint"]}
    small = Dictionary(
        torch.zeros(1, d), torch.zeros(1), torch.zeros(1, d), torch.zeros(d), gate=Threshold(torch.ones(1)), metadata=metadata
    )
    small.save(folder / "sae")
    settings = json.loads((folder / "sae" / "cfg.json").read_text()) | {"d_sae": f, "dtype": "bfloat16"}
    (folder / "sae" / "cfg.json").write_text(json.dumps(settings))
    shapes = {"W_enc": (d, f), "W_dec": (f, d), "b_enc": (f,), "threshold": (f,), "b_dec": (d,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(folder / "sae" / "sae_weights.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = 2 * f * d
        while left:
            numbers = torch.randn(min(left, ROWS * d), generator=generator) * d**-0.5
            file.write(numbers.bfloat16().view(torch.uint8).numpy().data)
            left -= len(numbers)
        for value, size in ((0.0, f), (theta, f), (0.0, d)):
            file.write(torch.full((size,), value).bfloat16().view(torch.uint8).numpy().data)


def threshold(std_n: torch.Tensor, density: float) -> float:
    """Above which a normal variable lies in this share of all cases, if in each it has one of these standard deviations."""
    low, high = 0.0, 10 * float(std_n.max())
    for _ in range(60):
        middle = (low + high) / 2
        above = float((0.5 * torch.special.erfc(middle / std_n / 2**0.5)).mean())
        low, high = (middle, high) if above > density else (low, middle)
    return high


class Watch:
    """Peaks of this process's memory from now on."""

    def __init__(self) -> None:
        self.before, self.own, self.read = self.status()["RssAnon"], 0, self.from_disk()
        self.start, self.ended = time.perf_counter(), threading.Event()
        threading.Thread(target=self.sample, daemon=True).start()

    @staticmethod
    def status() -> dict[str, int]:
        """MB; VmHWM is the peak of this program, which that of getrusage is not: it starts with the starting process's."""
        lines = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {name: int(value.split()[0]) * 1024 / 1e6 for name, value in lines if value.endswith("kB")}

    @staticmethod
    def from_disk() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))

    def sample(self) -> None:
        while not self.ended.wait(0.005):
            self.own = max(self.own, self.status()["RssAnon"] - self.before)

    def stop(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        self.ended.set()
        own = max(self.own, self.status()["RssAnon"] - self.before)
        return {"seconds": seconds, "own": own, "resident": self.status()["VmHWM"], "read": (self.from_disk() - self.read) / 1e6}


def measure(part: Part, folder: Path, threads: int, feature: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(threads)
    return {"steer": steer, "index": index, "page": page}[part](folder, feature)


def steer(folder: Path, feature: int) -> dict[str, dict[str, float]]:
    from sae.dictionaries.dictionary import Dictionary
    from sae.model.language_model import LanguageModel
    from steering.directions.feature import feature_direction
    from steering.intervention import DictionaryFeature, steered

    lm = LanguageModel.load(str(folder / "model"), device="cpu")
    ids_sp, _ = lm.encode(["One feature of very many."])
    lm.logits(ids_sp)
    watch = Watch()
    dictionary = Dictionary.load(folder / "sae")
    feature_direction(dictionary, feature, 1.0)
    with steered(lm, [(DictionaryFeature(dictionary, feature), 5.0)], operation="clamp"):
        lm.logits(ids_sp)
    return {"opening and steering with one feature": watch.stop()}


def index(folder: Path, feature: int) -> dict[str, dict[str, float]]:
    from sae.features.index.build import IndexConfig, build_index
    from sae.model.language_model import LanguageModel

    LanguageModel.load(str(folder / "model"), device="cpu")  # what it imports is no part of the measurement

    def build() -> None:
        build_index(IndexConfig(cache=folder / "cache", dictionary=str(folder / "sae"), out=folder / "index", device="cpu"))

    return {"indexing": watched(build)}


def page(folder: Path, feature: int) -> dict[str, dict[str, float]]:
    from sae.features.index.reader import FeatureIndex
    from sae.features.pages.feature import feature_html

    watch = Watch()
    opened = FeatureIndex.open(folder / "index")
    opened.dictionary()
    feature_html(opened, feature)
    first = watch.stop()
    others = watched(lambda: [feature_html(opened, (feature + 1 + 7919 * i) % opened.d_sae) for i in range(20)])
    return {"opening an index and one page": first, "20 more pages": others}


def watched(work: Callable[[], Any]) -> dict[str, float]:
    watch = Watch()
    work()
    return watch.stop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        settings = json.loads(sys.argv[2])
        print(json.dumps(measure(**(settings | {"folder": Path(settings["folder"])}))))
    else:
        sys.path.insert(0, str(ROOT))
        from sae.command_line import run

        run(benchmark, BenchmarkConfig, __doc__ or "")
