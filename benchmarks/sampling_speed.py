"""Speed of sampled generation as a share of greedy generation, on a model with a real vocabulary, beside Hugging Face's own sampling.

Arms take turns within a round and shares are taken within a round, as in steering_speed.py; seconds are the process's own processor time
where it has one thread, so that others on the machine count less.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from activation_report import table, where
from objective import machine, spread
from report import spread_text
from steering_speed import load
from torch import Tensor

from sae.command_line import run
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel

HEADER = ["arm", "ms a pass", "speed over that of greedy"]


@dataclass
class BenchmarkConfig:
    model: str = "runs/models/smollm2"
    """Folder or hub name of the model; `make real-model` fetches the default."""
    rows: int = 40
    """Texts generated together."""
    prompt_tokens: int = 16
    """Tokens in each prompt."""
    new_tokens: int = 20
    """Tokens generated from each prompt."""
    rounds: int = 5
    """Interleaved rounds, after one that is not counted."""
    device: str = "cpu"
    """Device: auto, cpu, cuda or cuda:1; auto takes a GPU when there is one."""
    dtype: str = "auto"
    """Dtype of the model."""
    threads: int = 1
    """Threads of the processor."""
    out: Path = Path("benchmarks/results/sampling.json")
    """File for the numbers."""


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Measures, prints a table and writes the numbers; returns what is in the file."""
    if min(config.rows, config.prompt_tokens, config.new_tokens, config.rounds, config.threads) < 1:
        raise InputError("expected rows, tokens, rounds and threads of at least 1")
    torch.set_num_threads(config.threads)
    lm = load(config.model, config)  # type: ignore[arg-type]
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    ids_sp = torch.randint(vocabulary, (config.rows, config.prompt_tokens), generator=torch.Generator().manual_seed(1)).to(lm.device)
    clock = time.process_time if config.threads == 1 and lm.device.type == "cpu" else time.perf_counter
    there = arms(lm, ids_sp, config.new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in there}
    for number in range(config.rounds + 1):
        for name in list(there)[:: 1 if number % 2 else -1]:
            start = clock()
            there[name]()[0, -1].item()  # host sync
            if number:
                seconds[name].append(clock() - start)
    found = {
        name: {
            "ms_per_token": spread([1000 * s / config.new_tokens for s in own]),
            "share": spread([g / s for s, g in zip(own, seconds["greedy"])]),
        }
        for name, own in seconds.items()
    }
    about = machine(config, torch.get_num_threads())
    result = {"machine": about, "date": date.today().isoformat(), "model": config.model, "vocabulary": vocabulary, "arms": found}
    print(f"{config.model}, vocabulary {vocabulary:,}, {config.rows} rows, {config.new_tokens} new tokens; {where(result)}\n")
    print("\n".join(table(HEADER, [[n, spread_text(v["ms_per_token"], 1), spread_text(v["share"], 3)] for n, v in found.items()])))
    write_json(config.out, result)
    return result


def arms(lm: LanguageModel, ids_sp: Tensor, new_tokens: int) -> dict[str, Callable[[], Tensor]]:
    def ours(**sampling: Any) -> Callable[[], Tensor]:
        return lambda: lm.generate(ids_sp, max_new_tokens=new_tokens, **sampling)

    def theirs(**sampling: Any) -> Callable[[], Tensor]:
        own = dict(max_new_tokens=new_tokens, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=lm.pad_id)
        return lambda: lm.model.generate(ids_sp, attention_mask=torch.ones_like(ids_sp), **own, **sampling)

    return {
        "greedy": ours(temperature=0),
        "greedy, again": ours(temperature=0),
        "sampled": ours(temperature=1.0),
        "sampled, top-p 0.95": ours(temperature=1.0, top_p=0.95),
        "Hugging Face's sampling": theirs(),
        "Hugging Face's sampling, top-p 0.95": theirs(top_p=0.95),
    }


if __name__ == "__main__":
    run(benchmark, BenchmarkConfig, __doc__ or "")
