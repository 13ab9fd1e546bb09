"""Everything that is shown of every feature: our index and its export beside SAEDashboard's own runner, same dictionary, same tokens.

The text is cut into whole contexts, none of them twice, with a beginning of text before each, so that nobody has padding to skip.
ours: the index of all features from a cache of the text, then its export in SAEDashboard's format; the harvest is timed apart.
SAEDashboard: its Neuronpedia runner with its own settings, in the environment that `make bench-peers` creates, 128 features a batch; a
    round is one batch. The first batch runs the model too and stores its activations; it is reported separately and not counted.

Each in its own process, one at a time, models and libraries loaded beforehand; ratios are taken within a round. What both say of the
same features is compared: how often they fire, their maxima. Then our reader reads SAEDashboard's folder and writes it again.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from objective import machine, spread
from rounds import OFFLINE, PEERS_PYTHON, ArmFailed, started

from sae.activations.cache import ActivationCache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.text.documents import TextConfig, documents
from sae.activations.text.tokens import tokenise
from sae.command_line import run
from sae.dictionaries.dictionary import Dictionary
from sae.disk.reading import read_json
from sae.disk.writing import write_json, write_tensors
from sae.errors import InputError
from sae.features.exports.command import ExportConfig, export_features
from sae.features.exports.saedashboard import read_saedashboard, rewrite_saedashboard
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.reader import FeatureIndex
from sae.model.language_model import LanguageModel


@dataclass(kw_only=True)
class BenchmarkConfig:
    model: Path = Path("checkpoints/demo-lm")
    """Folder of a GPT-2."""
    text: Path = Path("checkpoints/demo-lm/tokens.safetensors")
    """Token file."""
    dictionary: Path = Path("checkpoints/demo-sae")
    """Dictionary at one of the model's sites."""
    tokens: int = 500_000
    """Tokens to index at most, in whole contexts."""
    rounds: int = 5
    """Rounds: ours with all features, SAEDashboard with 128."""
    threads: int | None = None
    """Threads of torch. Default: one per core."""
    work: Path = Path("runs")
    """Folder for temporary files."""
    out: Path = Path("benchmarks/results/dashboards.json")
    """File for the numbers."""
    device: Literal["cpu"] = "cpu"
    """Device; only the CPU is measured."""


def benchmark(config: BenchmarkConfig) -> None:
    if min(config.tokens, config.rounds, config.threads or 1) < 1:
        raise InputError("expected tokens, rounds and threads of at least 1, got a smaller number; give larger ones")
    if not PEERS_PYTHON.exists():
        raise InputError("expected SAEDashboard in .peers, but there is no such environment; make bench-peers creates it")
    threads = config.threads or torch.get_num_threads()
    about = machine(config, threads)  # type: ignore[arg-type]  # only asks for the device
    config.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.work) as name:
        folder = Path(name).resolve()
        seconds = prepare(config, folder)
        settings = {"tokens": str(folder / "prompts.safetensors"), "model": str(config.model), "dictionary": str(config.dictionary)}
        settings |= {"folder": str(folder), "out": str(folder / "theirs"), "threads": threads}
        rounds: list[tuple[dict[str, float], dict[str, float]]] = []
        try:
            with started("dashboard_arm.py", settings, OFFLINE, peers=True) as theirs:
                theirs.answer()
                first = theirs.ask("the first batch")
                for number in range(config.rounds):
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        ours = pool.apply(in_process, (config, folder, threads))
                    rounds.append((ours, theirs.ask("a batch")))
                    print(f"round {number + 1}: {json.dumps(rounds[-1])}", flush=True)
        except ArmFailed as reason:
            raise InputError(f"SAEDashboard failed, so the others have nothing to be compared with: {reason}") from None
        found = {
            "date": date.today().isoformat(),
            "machine": about,
            "tokens": config.tokens,
            "harvest_seconds": seconds,
            "first_batch_seconds": first["seconds"],
            **numbers(rounds),
            "agreement": agreement(folder),
        }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.out, found)
    print(json.dumps(found, indent=1))


def prepare(config: BenchmarkConfig, folder: Path) -> float:
    """Writes the contexts for both, and a cache of them; returns the seconds of the harvest, loading of the model included."""
    lm, site = LanguageModel.load(str(config.model)), Dictionary.load(config.dictionary).site
    if lm.bos_id is None or site is None:
        raise InputError("expected a model with a beginning of text and a dictionary that names its site")
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    texts = [ids for ids, _ in tokenise(documents(TextConfig(text=(str(config.text),))), lm.tokenizer, vocabulary, lm.bos_id)]
    width = min(lm.context - 1, max(map(len, texts)))
    contexts = [ids[low : low + width] for ids in texts for low in range(0, len(ids) - width + 1, width)]
    rows_sp = np.unique(np.array(contexts), axis=0)
    rows_sp = np.random.default_rng(0).permutation(rows_sp)[: max(1, config.tokens // width)]
    text = {"ids": torch.from_numpy(rows_sp.flatten()), "document_starts": torch.arange(len(rows_sp) + 1) * width}
    write_tensors(folder / "text.safetensors", text)
    prompts_sp = np.pad(rows_sp, ((0, 0), (1, 0)), constant_values=lm.bos_id)
    write_tensors(folder / "prompts.safetensors", {"tokens": torch.from_numpy(prompts_sp).long()})
    start = time.perf_counter()
    harvest(
        HarvestConfig(text=(str(folder / "text.safetensors"),), out=folder / "cache", model=str(config.model), sites=(site,), device="cpu")
    )
    return time.perf_counter() - start


def in_process(config: BenchmarkConfig, folder: Path, threads: int) -> dict[str, float]:
    """Our index and export of all features."""
    torch.set_num_threads(threads)
    LanguageModel.load(ActivationCache.open(folder / "cache").model_name(), device="cpu")  # what it imports is no part of the time
    start = time.perf_counter()
    build_index(IndexConfig(cache=folder / "cache", dictionary=config.dictionary, out=folder / "index", device="cpu"))
    built = time.perf_counter()
    export = ExportConfig(index=folder / "index", out=folder / "ours", format="saedashboard", dictionary=config.dictionary)
    export_features(export)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    d_sae = FeatureIndex.open(folder / "index").d_sae
    return {"features": d_sae, "seconds": time.perf_counter() - start, "index_seconds": built - start, "peak_mib": peak}


def numbers(rounds: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    def per_thousand(arm: dict[str, float]) -> float:
        return 1000 * arm["seconds"] / arm["features"]

    return {
        "ours": {
            "seconds_per_1000": spread([per_thousand(ours) for ours, _ in rounds]),
            "index_seconds": spread([ours["index_seconds"] for ours, _ in rounds]),
            "peak_mib": spread([ours["peak_mib"] for ours, _ in rounds]),
        },
        "saedashboard": {
            "seconds_per_1000": spread([per_thousand(theirs) for _, theirs in rounds]),
            "peak_mib": spread([theirs["peak_mib"] for _, theirs in rounds]),
        },
        "times_ours": spread([per_thousand(theirs) / per_thousand(ours) for ours, theirs in rounds]),
    }


def agreement(folder: Path) -> dict[str, Any]:
    """Of the features that SAEDashboard rendered: largest differences of what both measured, and whether its folder survives our reader.

    It counts the beginning of text among the tokens, and prints densities rounded to 0.001 %; our activations are stored in half precision.
    """
    theirs, index = read_saedashboard(folder / "theirs"), FeatureIndex.open(folder / "index")
    rows = [row for batch in theirs.batches.values() for row in batch["features"]]
    width = int(np.diff(index.tokens["sequence_starts"]).max())
    density = [abs(row["frac_nonzero"] * (width + 1) / width - float(index.columns["density"][row["feature_index"]])) for row in rows]
    fires = [row for row in rows if index.columns["count"][row["feature_index"]]]
    highest = [max(max(activation["values"]) for activation in row["activations"]) for row in fires]
    top = [abs(high / float(index.columns["max"][row["feature_index"]]) - 1) for high, row in zip(highest, fires)]
    rewrite_saedashboard(theirs, folder / "again")
    written = [path.name for path in (folder / "theirs").glob("batch-*.json")]
    one = rows[0], read_saedashboard(folder / "ours").batches["batch-0"]["features"][0]
    fields = [(set(row), {name for activation in row["activations"] for name in activation}) for row in one]
    return {
        "features": len(rows),
        "density_difference": max(density),
        "max_relative_difference": max(top),
        "folder_rewritten_the_same": all(read_json(folder / "again" / n, "") == read_json(folder / "theirs" / n, "") for n in written),
        "fields_the_same": fields[0] == fields[1],
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    run(benchmark, BenchmarkConfig, __doc__ or "")
