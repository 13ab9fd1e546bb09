"""Speed of greedy generation with an intervention active, as a share of the speed without an intervention.

Every round generates the same number of new tokens once with each arm, in an order that turns round from one round to the next, so that a
slow spell of the machine hits all alike; shares are taken within a round. "none, again" is the plain generation a second time: what its
share is off 1 is the machine's noise. "bare hook" is a hook on the same module that does nothing: what any intervention by hook costs.
Where the noise is larger than what is to be measured, the hooks' own time tells more: in one more generation, clocks stand before and
after them in every pass; the median over the passes (on CUDA, the host's part alone).
The model `random-gpt2` has GPT-2 small's size and random weights, of which nothing but the time means anything.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from activation_report import table, where
from objective import machine, spread
from report import spread_text
from torch import Tensor

from sae.command_line import run
from sae.dictionaries.dictionary import Dictionary
from sae.disk.reading import read_json
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import progress
from steering.intervention import OPERATIONS, DictionaryFeature, steered
from steering.vector import SteeringVector

RANDOM = "random-gpt2"
HEADER = ["batch", "arm", "ms a pass", "share of the speed without", "ms in hooks", "share by these"]
Arm = Callable[[], AbstractContextManager[Any]]


@dataclass
class BenchmarkConfig:
    models: tuple[str, ...] = ("checkpoints/demo-lm", RANDOM)
    """Folders or hub names; random-gpt2 is built, not loaded. The numbers of other models stay in the file."""
    batches: tuple[int, ...] = (1, 24)
    """Numbers of prompts that are continued together."""
    prompt_tokens: int = 16
    """Tokens in each prompt."""
    new_tokens: int = 60
    """Tokens generated from each prompt."""
    rounds: int = 7
    """Interleaved rounds, after a plain generation that is not counted."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device: auto, cpu, cuda or cuda:1; auto takes a GPU when there is one."""
    dtype: str = "auto"
    """Dtype of the model: auto, float32, bfloat16 or float16."""
    threads: int | None = None
    """Threads of torch. Default: one per core."""
    out: Path = Path("benchmarks/results/steering.json")
    """File for the numbers."""
    markdown: bool = False
    """Also print them as a markdown table."""

    def check(self) -> None:
        """Raises `InputError` for values that make no sense."""
        if min(*self.batches, self.prompt_tokens, self.new_tokens, self.rounds, self.threads or 1) < 1 or not self.models:
            raise InputError("expected a model, and batches, tokens, rounds and threads of at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("expected a CUDA device for --device cuda, found none; leave the flag out")


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Measures, prints a table and writes the numbers; returns what is in the file."""
    config.check()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    record = read_json(config.out, "this benchmark's numbers") if config.out.exists() else {}
    about = machine(config, torch.get_num_threads())
    flags = {k: v for k, v in asdict(config).items() if k not in ("models", "out", "markdown")}
    for name in config.models:
        lm = load(name, config)
        parameters = sum(weight.numel() for weight in lm.model.parameters())
        size = {"layers": lm.n_layers, "width": lm.d_model, "parameters": parameters, "dtype": str(lm.dtype).removeprefix("torch.")}
        cases = {str(rows): measure(lm, rows, config) for rows in config.batches}
        record[name] = {"machine": about, "date": date.today().isoformat(), "flags": flags, "size": size, "batches": cases}
        print("\n".join(lines(name, record[name])), flush=True)
        write_json(config.out, record)
    if config.markdown:
        print("\n\n".join("\n".join(lines(name, found)) for name, found in record.items()))
    return record


def load(name: str, config: BenchmarkConfig) -> LanguageModel:
    """The model, which will not end a text before the number of new tokens is reached."""
    if name == RANDOM:
        import transformers as hf

        torch.manual_seed(0)
        dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        lm = LanguageModel(hf.GPT2LMHeadModel(hf.GPT2Config()).to(config.device, dtype), name=RANDOM)
    else:
        lm = LanguageModel.load(name, device=config.device, dtype=config.dtype)
    if config.prompt_tokens + config.new_tokens > lm.context:
        raise InputError(f"expected prompt and new tokens within the context of {name}, {lm.context}, got more; ask for fewer")
    if lm.model.generation_config:
        lm.model.generation_config.eos_token_id = None
    return lm


def arms(lm: LanguageModel, prompt_tokens: int) -> dict[str, Arm]:
    """What generation runs under, by name: one direction, or one feature to clamp or ablate, in the middle of the model."""
    site = f"resid_post.{lm.n_layers // 2}"
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector.at(site, torch.randn(lm.d_model, generator=generator)).unit()
    feature = DictionaryFeature(Dictionary.initial(lm.d_model, 8, seed=0), 3, site)
    places: dict[str, dict[str, Any]] = {
        "all": {"positions": "all"},
        "generated": {"positions": "generated", "prompt_length": prompt_tokens},
    }

    def under(operation: str, place: str) -> Arm:
        item = feature if operation in ("clamp", "ablate") else vector
        return lambda: steered(lm, [(item, 1.0)], operation=operation, **places[place])

    chosen: dict[str, Arm] = {"none": nullcontext, "none, again": nullcontext, "bare hook": lambda: bare_hook(lm, site)}
    return chosen | {f"{operation}, {place} positions": under(operation, place) for operation in OPERATIONS for place in places}


@contextmanager
def bare_hook(lm: LanguageModel, site: str) -> Iterator[None]:
    handle = lm.place(site).module.register_forward_hook(lambda _module, _args, _output: None)
    try:
        yield
    finally:
        handle.remove()


def measure(lm: LanguageModel, rows: int, config: BenchmarkConfig) -> dict[str, Any]:
    """Seconds of every arm in every round, as medians and ranges."""
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    ids_sp = torch.randint(vocabulary, (rows, config.prompt_tokens), generator=torch.Generator().manual_seed(1)).to(lm.device)
    there = arms(lm, config.prompt_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in there}
    timed(lm, ids_sp, config.new_tokens)
    with progress(f"{lm.name}, batch {rows}", config.rounds, "rounds") as bar:
        for number in range(config.rounds):
            for name in list(there)[:: 1 if number % 2 else -1]:
                with there[name]():
                    seconds[name].append(timed(lm, ids_sp, config.new_tokens))
            bar.advance(1)
    own_ms = {name: hooks_ms(lm, ids_sp, config.new_tokens, arm) for name, arm in there.items()}
    return {
        name: {
            "hooks_ms": own_ms[name],
            "ms_per_token": spread([1000 * s / config.new_tokens for s in own]),
            "share_of_speed": spread([plain / s for s, plain in zip(own, seconds["none"])]),
        }
        for name, own in seconds.items()
    }


def timed(lm: LanguageModel, ids_sp: Tensor, new_tokens: int) -> float:
    """Seconds of a generation, which ends with the host reading its last token."""
    start = time.perf_counter()
    whole_sp = lm.generate(ids_sp, max_new_tokens=new_tokens, temperature=0)
    whole_sp[0, -1].item()  # host sync
    seconds = time.perf_counter() - start
    if whole_sp.shape[1] != ids_sp.shape[1] + new_tokens:
        raise InputError(f"expected {new_tokens} new tokens in every arm, got {whole_sp.shape[1] - ids_sp.shape[1]}; the text ended early")
    return seconds


def hooks_ms(lm: LanguageModel, ids_sp: Tensor, new_tokens: int, arm: Arm) -> float:
    """Median milliseconds a pass spends in hooks: before the decoder, at the site, after the model."""
    clocks: list[float] = []

    def tick(*_: Any) -> None:
        clocks.append(time.perf_counter())

    decoder, block = lm.model.get_decoder(), lm.place(f"resid_post.{lm.n_layers // 2}").module
    with arm(), ExitStack() as stack:
        for prepend in (True, False):
            stack.callback(decoder.register_forward_pre_hook(tick, prepend=prepend).remove)
            stack.callback(block.register_forward_hook(tick, prepend=prepend).remove)
            stack.callback(lm.model.register_forward_hook(tick, prepend=prepend).remove)
        lm.generate(ids_sp, max_new_tokens=new_tokens, temperature=0)
    before_and_after = torch.tensor(clocks, dtype=torch.float64).view(new_tokens, 3, 2)
    return float(before_and_after.diff(dim=-1).sum((1, 2)).median()) * 1000


def lines(name: str, found: dict[str, Any]) -> list[str]:
    size, flags = found["size"], found["flags"]
    rows = [
        [
            batch,
            arm,
            spread_text(values["ms_per_token"], 2),
            spread_text(values["share_of_speed"], 3),
            f"{values['hooks_ms']:.3f}",
            f"{1 - values['hooks_ms'] / case['none']['ms_per_token']['median']:.3f}",
        ]
        for batch, case in found["batches"].items()
        for arm, values in case.items()
    ]
    model = f"{name} ({size['layers']} layers of {size['width']}, {size['parameters'] / 1e6:,.0f}M weights, {size['dtype']})"
    said = f"{model}: {flags['prompt_tokens']} tokens of prompt, {flags['new_tokens']} new ones, {flags['rounds']} rounds; {where(found)}"
    return [said, "", *table(HEADER, rows)]


if __name__ == "__main__":
    run(benchmark, BenchmarkConfig, __doc__ or "")
