"""One arm of activations.py in its own process: it gets ready, then works once for each line on its standard input.

It answers in lines of JSON on its standard output, and {"error"} when it cannot continue. Needs Linux (memory from /proc).
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from answers import Answer, answering

LABELS = {
    "bare": "bare forward pass, stopped at the deepest site, nothing kept",
    "harvest": "our harvest, to the finished cache",
    "full": "Hugging Face forward pass with output_hidden_states, nothing kept",
    "saelens": "SAELens CacheActivationsRunner",
}
PEERS = ("saelens",)

Round = Callable[[], dict[str, Any]]


def forward_passes(settings: dict[str, Any], whole: bool) -> Round:
    """The batches of a harvest with these settings, made beforehand; `whole` for Hugging Face's own forward pass with all layers."""
    import torch

    from sae.activations.harvest.command import HarvestConfig
    from sae.activations.harvest.models import Models
    from sae.activations.harvest.plan import plan_pools
    from sae.activations.harvest.settings import cut_text, load_models, make_recorder
    from sae.activations.text.tokens import Tokens
    from sae.model.language_model import LanguageModel

    config = HarvestConfig(out=Path(settings["folder"]), **settings["harvest"])
    models = Models(LanguageModel.load(config.model, device=config.device)) if whole else load_models(config)
    lm = models.first
    cutter, parts = cut_text(config, models)
    tokens = Tokens.join(list(parts), cutter.label_names)
    recorder = make_recorder(config, models, tokens)
    sizes = {"pool_tokens": config.pool_tokens, "shard_tokens": config.shard_tokens, "masks": recorder.masks}
    pools = plan_pools(tokens, seed=config.seed, **sizes)
    batches = [batch.ids_sp for pool in pools for batch in recorder._batches(pool)]

    @torch.no_grad()
    def run() -> dict[str, Any]:
        start = time.monotonic()
        for ids_sp in batches:
            if whole:
                lm.model(input_ids=ids_sp.to(lm.device), output_hidden_states=True, use_cache=False)
            else:
                lm.record(ids_sp.to(lm.device), list(config.sites))
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.monotonic() - start, "tokens": len(tokens.ids)}

    return run


def harvest(settings: dict[str, Any]) -> Round:
    """All of `harvest` but the loading of the model: tokens, forward passes, shuffle, shards on disk, manifest."""
    from sae.activations.harvest import command as module

    config = module.HarvestConfig(out=Path(settings["folder"]) / "harvest", **settings["harvest"])
    models = module.load_models(config)
    module.load_models = lambda _: models

    def run() -> dict[str, Any]:
        start = time.monotonic()
        module.harvest(config)
        seconds = time.monotonic() - start
        manifest = json.loads((config.out / "manifest.json").read_text())
        shutil.rmtree(config.out)
        files = [file for shard in manifest["shards"] for file in shard["files"].values()]
        counts = manifest["counts"]
        return {
            "seconds": seconds,
            "tokens": counts["tokens"],
            "padding": counts["left_out"]["padding"],
            "rows": sum(counts["rows"].values()),
            "bytes": sum(file["bytes"] for file in files),
        }

    return run


def saelens(settings: dict[str, Any]) -> Round:
    """All of the runner but the loading of the model, on rows of whole contexts, as its own tokenisation packs them, in half precision."""
    import datasets
    import torch
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from safetensors.torch import load_file

    datasets.disable_progress_bars()
    rows = load_file(settings["packed"])["tokens"]
    folder = Path(settings["folder"]) / "saelens"
    config = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name=settings["harvest"]["model"],
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": torch.float32},
        hook_name=settings["hook"],
        d_in=settings["d_in"],
        model_batch_size=settings["batch_rows"],
        context_size=rows.shape[1],
        training_tokens=rows.numel(),
        buffer_size_gb=rows[: settings["pool_rows"]].numel() * settings["d_in"] * 2 / 1e9 + 1e-7,
        new_cached_activations_path=str(folder),
        dtype="float16",
        device="cpu" if settings["harvest"]["device"] == "auto" else settings["harvest"]["device"],
    )
    texts = datasets.Dataset.from_dict({"tokens": rows.tolist()})
    model = CacheActivationsRunner(config, override_dataset=texts).model
    import sae_lens.cache_activations_runner as module

    module.load_model = lambda **_: model

    def run() -> dict[str, Any]:
        start = time.monotonic()
        made = CacheActivationsRunner(config, override_dataset=texts).run()
        os.sync()  # ours is on the disk when it ends
        seconds = time.monotonic() - start
        tokens, size = len(made) * rows.shape[1], sum(path.stat().st_size for path in folder.glob("*.arrow"))
        shutil.rmtree(folder)
        return {"seconds": seconds, "tokens": tokens, "bytes": size}

    return run


def read(settings: dict[str, Any]) -> Round:
    """One epoch of training batches in float32, of a cache that is opened in the first round; reads on from there in the next."""
    from sae.activations.cache import ActivationCache
    from sae.activations.cached import CachedSource
    from sae.activations.source import Batches

    before = memory("VmRSS")
    reader: list[Batches] = []

    def run() -> dict[str, Any]:
        start = time.monotonic()
        if not reader:
            reader.append(CachedSource(ActivationCache.open(settings["cache"])).batches(settings["batch_size"]))
        for _ in range(int(reader[0].batches_per_epoch)):
            next(reader[0])
        return {"seconds": time.monotonic() - start, "peak": memory("VmHWM") - before}

    return run


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


ARMS: dict[str, Callable[[dict[str, Any]], Round]] = {
    "bare": lambda settings: forward_passes(settings, False),
    "full": lambda settings: forward_passes(settings, True),
    "harvest": harvest,
    "saelens": saelens,
    "read": read,
}


def serve(settings: dict[str, Any], answer: Answer) -> None:
    import torch

    torch.set_num_threads(settings["threads"])
    run = ARMS[settings["arm"]](settings)
    answer(ready=True)
    for _ in sys.stdin:
        answer(**run())


if __name__ == "__main__":
    answering(serve)
