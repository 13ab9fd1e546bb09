"""Time and memory of a whole training step, Adam included, beside other tools' steps, as multiples of the encoder product alone.

Every arm runs in its own process on the same batch and weights; one computes at a time, in interleaved rounds, so that a slow spell
of the machine hits all alike. Medians and ranges are over rounds, those of ratios over ratios within a round. Rivals have glibc's
allocator tuned to keep freed memory (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_) unless their name says otherwise; our step has the
default, so that no gain is the allocator's. Peak memory is what the step needs beyond weights, Adam's moments and the batch.

b rows (tokens) · d model width · f features
"""

import os
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from arms import LABELS, PEERS
from report import describe, markdown, print_table
from rounds import PEERS_PYTHON, Measured, measure
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.command_line import run
from sae.dictionaries.dictionary import Dictionary
from sae.disk.writing import write_json
from sae.encoding import Method
from sae.errors import InputError
from sae.objective import Weights

Rival = Literal["eager", "eager_tuned", "compile", "saelens", "dictionary_learning", "sparsify", "sparsify_plain"]


@dataclass
class BenchmarkConfig:
    d_in: tuple[int, ...] = ()
    """Model widths. Default: 512; on CUDA 768 and 2304."""
    d_sae: tuple[int, ...] = ()
    """Features. Default: 4,096 and 16,384; on CUDA 32,768 and 131,072."""
    l0: tuple[float, ...] = ()
    """Mean number of active features in a row. Default: 64; on CUDA 50."""
    batch_size: int | None = None
    """Activations per step. Default: 4,096; on CUDA 8,192."""
    stream: str = "synthetic"
    """"synthetic" for normally distributed activations, or the folder of an activation cache."""
    dictionary: Path | None = None
    """Folder of a dictionary trained on that cache, for its weights, size and firing. Default: initial weights."""
    growth: bool = False
    """Measure how cost grows instead: with the number of features (4,096 to 1,048,576, in a narrow model) and with L0 (up to F/2)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run; on CUDA products are in bfloat16."""
    backend: Literal["auto", "dense", "sparse", "triton"] = "auto"
    """Backend of our step."""
    encoder: Literal["auto"] | Method = "auto"
    """How our step finds active entries while the code is sparse; auto measures. On CUDA always the product."""
    rivals: tuple[Rival, ...] | None = None
    """Steps to compare with. Default: all; with --growth the compiled one."""
    rounds: int = 5
    """Interleaved rounds, after one that is not counted."""
    threads: int | None = None
    """Threads of each arm. Default: one per core."""
    l1: float = 1.0
    """L1 coefficient."""
    seed: int = 0
    """Seed of the batch and the weights."""
    peak_tflops: float | None = None
    """Peak TFLOPS of the device, for the floor printed beside the times. Default: 790 on CUDA (H200, dense bfloat16), no floor on a CPU."""
    bandwidth: float | None = None
    """Memory bandwidth of the device in GB/s, for the floor. Default: 4,800 on CUDA (H200), no floor on a CPU."""
    out: Path | None = None
    """File for the numbers. Default: benchmarks/results/objective.json, with the mode in its name."""
    markdown: bool = False
    """Also print the numbers as a markdown table."""

    def check(self) -> None:
        """Raises `InputError` for flags that cannot be used, or not together."""
        numbers = [*self.d_in, *self.d_sae, *(n for n in (self.batch_size, self.threads) if n is not None), self.rounds]
        if min(numbers) < 1:
            raise InputError(f"expected sizes, rounds and threads of at least 1, got {min(numbers)}; give larger ones")
        if self.l0 and not 0 < min(self.l0) <= max(self.l0) <= min(self.d_sae or defaults(self)["d_sae"]):
            raise InputError(f"expected every L0 above 0 and no larger than --d-sae, got {self.l0}; give others")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError(f"expected a CUDA GPU for --device cuda, but torch {torch.__version__} finds none; take --device cpu")
        if self.encoder not in ("auto", "product") and (self.device == "cuda" or self.backend in ("dense", "triton")):
            raise InputError(f"expected the CPU and --backend auto or sparse for --encoder {self.encoder}, got others; leave it out")
        if self.backend == "triton" and self.device == "cpu":
            raise InputError("expected --device cuda for --backend triton, got cpu; choose another backend")
        if self.growth and (self.d_in or self.d_sae or self.l0 or self.batch_size or self.stream != "synthetic" or self.dictionary):
            raise InputError("--growth has sizes of its own on a synthetic stream; leave out --d-in, --d-sae, --l0, --batch-size, --stream")
        if self.stream != "synthetic" and self.d_in:
            raise InputError(f"the cache {self.stream} has a width of its own; leave out --d-in")
        if self.dictionary and (self.stream == "synthetic" or self.d_sae or self.l0):
            raise InputError("--dictionary needs the cache it was trained on as --stream, and its own size and L0: no --d-sae, no --l0")


class Case(NamedTuple):
    d_in: int
    d_sae: int
    l0: float | None
    """None where the dictionary decides"""
    batch_size: int


def benchmark(config: BenchmarkConfig) -> None:
    config.check()
    cache = None if config.stream == "synthetic" else ActivationCache.open(config.stream)
    dictionary = Dictionary.load(config.dictionary) if config.dictionary else None
    if cache and dictionary and cache.d_in != dictionary.d_in:
        raise InputError(f"expected a dictionary for activations {cache.d_in} wide, but {config.dictionary} is for {dictionary.d_in}")
    todo, arms, out = cases(config, cache, dictionary), arms_of(config), config.out or default_out(config)
    threads = config.threads or torch.get_num_threads()
    encoder = "product" if config.device == "cuda" or config.backend in ("dense", "triton") else config.encoder
    settings = {"device": config.device, "threads": threads, "backend": config.backend, "encoder": encoder, "l1": config.l1}
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    record: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine(config, threads), "flags": flags, "cases": []}
    for number, case in enumerate(todo):
        print(f"case {number + 1} of {len(todo)}: {describe(case._asdict())}", flush=True)
        measured = measure(arms, problem(config, case, cache, dictionary), settings, config.rounds)
        record["cases"].append(summary(config, case, measured))
        write_json(out, record)
        print_table(record["cases"][-1])
    print(f"written to {out}")
    if config.markdown:
        print(markdown(record))


def defaults(config: BenchmarkConfig) -> dict[str, Any]:
    if config.device == "cuda":
        return dict(d_in=(768, 2304), d_sae=(32_768, 131_072), l0=(50.0,), batch_size=8192)
    return dict(d_in=(512,), d_sae=(4096, 16_384), l0=(64.0,), batch_size=4096)


def cases(config: BenchmarkConfig, cache: ActivationCache | None, dictionary: Dictionary | None) -> list[Case]:
    default = defaults(config)
    batch_size = config.batch_size or default["batch_size"]
    if config.growth:
        return growth_cases(config.device, default)
    if dictionary is not None:
        return [Case(dictionary.d_in, dictionary.d_sae, None, batch_size)]
    d_ins = (cache.d_in,) if cache is not None else config.d_in or default["d_in"]
    d_saes, l0s = config.d_sae or default["d_sae"], config.l0 or default["l0"]
    return [Case(d_in, d_sae, l0, batch_size) for d_in in d_ins for d_sae in d_saes for l0 in l0s]


def growth_cases(device: str, default: dict[str, Any]) -> list[Case]:
    """First along F, then along L0 up to half of all features, as at the start of training."""
    d_in, batch_size = (768, 8192) if device == "cuda" else (64, 2048)
    print(f"growth with F is measured at d_in {d_in} and batch {batch_size:,}, so that weights and moments of 1,048,576 features fit")
    l0, f = default["l0"][0], 16_384
    along_f = [Case(d_in, d_sae, l0, batch_size) for d_sae in (4096, 16_384, 65_536, 262_144, 1_048_576)]
    return along_f + [Case(default["d_in"][0], f, l0, default["batch_size"]) for l0 in (16, 32, 64, 128, 256, 512, f / 8, f / 2)]


def arms_of(config: BenchmarkConfig) -> list[str]:
    rivals = config.rivals if config.rivals is not None else ("compile",) if config.growth else tuple(LABELS)[2:]
    if set(rivals) & set(PEERS) and not PEERS_PYTHON.exists():
        print("no .peers environment: the other tools are left out (make bench-peers creates it)")
        rivals = tuple(r for r in rivals if r not in PEERS)
    return ["encoder", "ours", *dict.fromkeys(rivals)]


def default_out(config: BenchmarkConfig) -> Path:
    parts = ["objective", *(["growth"] if config.growth else []), *(["cuda"] if config.device == "cuda" else [])]
    if config.stream != "synthetic":
        parts.append((config.dictionary or Path(config.stream)).resolve().name)
    return Path("benchmarks/results") / f"{'-'.join(parts)}.json"


def machine(config: BenchmarkConfig, threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if config.device == "cuda" else None
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is busy (load average {load:.1f}): threads wait for the slowest of them, so ratios will be off too")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"cpu": cpu, "threads": threads, "gpu": gpu, "load_average": load, **versions}


@torch.no_grad()
def problem(config: BenchmarkConfig, case: Case, cache: ActivationCache | None, dictionary: Dictionary | None) -> dict[str, Tensor]:
    """The batch, of mean squared norm d, and weights; without a dictionary, initial ones under a bias that gives the case's L0."""
    if cache is None:
        x_bd = torch.randn(case.batch_size, case.d_in, generator=torch.Generator().manual_seed(config.seed))
        scale = 1.0
    else:
        scale = (cache.d_in / cache.mean_squared_norm) ** 0.5
        x_bd = next(CachedSource(cache).batches(case.batch_size, seed=config.seed))[cache.site] * scale
    if dictionary is not None:
        sae = dictionary.folded(1 / scale)
    else:
        assert case.l0 is not None, "only a dictionary has an L0 of its own"
        sae = Dictionary.initial(case.d_in, case.d_sae, seed=config.seed, decoder_norm=1.0)
        sae.b_dec_o.copy_(x_bd.mean(0))
        sae.b_enc_f.fill_(-threshold(sae, x_bd, case.l0))
    weights = Weights(sae.W_enc_fd, sae.b_enc_f, sae.W_dec_fo, sae.b_dec_o)
    return {"x_bd": x_bd, **{name: value.detach() for name, value in weights._asdict().items()}}


def threshold(sae: Dictionary, x_bd: Tensor, l0: float) -> float:
    """What `l0` of a row's pre-activations exceed, on average over the batch; found among the largest, since all may not fit in memory."""
    chunks = x_bd.split(max(16, (1 << 24) // sae.d_sae))
    share = 1 - 8 * l0 / sae.d_sae  # of the first chunk that is surely below
    first_n = sae.pre_activations(chunks[0]).flatten()
    surely_below = first_n.kthvalue(int(share * first_n.numel())).values if share * first_n.numel() >= 1 else -torch.inf
    largest_n = torch.cat([z_bf[z_bf > surely_below] for z_bf in map(sae.pre_activations, chunks)])
    rank = max(1, largest_n.numel() - round(l0 * len(x_bd)))
    # between two values, so that rounding does not decide whether one of them fires
    return sum(float(largest_n.kthvalue(r).values) for r in (rank, min(rank + 1, largest_n.numel()))) / 2


def summary(config: BenchmarkConfig, case: Case, measured: Measured) -> dict[str, Any]:
    """Medians and ranges over rounds; `l0` is then the measured one."""
    encoder, ours = measured.seconds["encoder"], measured.seconds["ours"]
    arms: dict[str, dict[str, Any]] = {}
    for arm, end in measured.ends.items():
        own = measured.seconds[arm]
        arms[arm] = {
            "label": LABELS[arm]
            + (f" {end['version']}" if "version" in end else "")
            + (f" ({end['encoder']})" if "encoder" in end else ""),
            "ms": spread([1000 * s for s in own]),
            "tokens_per_second": case.batch_size / median(own),
            "times_encoder": spread([s / e for s, e in zip(own, encoder)]),
            "times_ours": spread([s / o for s, o in zip(own, ours)]),
            "peak_mib": (end["peak"] - end["held"]) / 2**20,
            "total_mib": end["peak"] / 2**20,
        }
        arms[arm] |= {name: end[name] for name in ("loss", "sparse_share", "encoder") if name in end}
    l0 = measured.ends["encoder"]["l0"]
    return {**case._asdict(), "l0": l0, "floor_ms": floor(config, case, l0), "arms": arms, "left_out": measured.left_out}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def floor(config: BenchmarkConfig, case: Case, l0: float) -> dict[str, float]:
    """Milliseconds that no exact step can beat, by operations (encoder product; decode, latent gradient and two weight gradients on the
    active entries) and by bytes (weights and two moments, read and written in float32; the batch read once)."""
    peak_tflops = config.peak_tflops or (790.0 if config.device == "cuda" else None)
    bandwidth = config.bandwidth or (4800.0 if config.device == "cuda" else None)
    operations = 2 * case.batch_size * case.d_in * (case.d_sae + 4 * l0)
    moved = 2 * 6 * 4 * case.d_sae * case.d_in + 4 * case.batch_size * case.d_in
    return {
        **({"operations": operations / peak_tflops / 1e9} if peak_tflops else {}),
        **({"bytes": moved / bandwidth / 1e6} if bandwidth else {}),
    }


if __name__ == "__main__":
    run(benchmark, BenchmarkConfig, __doc__ or "")
