"""Trained transcoders, with and without a skip: SAELens, and circuit-tracer with a set of them, compute the same (`make bench-peers`)."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sae.activations.cache import ActivationCache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.dictionaries.dictionary import Dictionary
from sae.features.exports.transcoders import TranscodersConfig, export_transcoders
from sae.kinds import KINDS
from sae.training.plan import PlanConfig, train_plan

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers" / "bin" / "python"
SIDES = Path(__file__).with_name("circuit_tracer_side.py"), ROOT / "tests" / "dictionaries" / "formats" / "saelens_side.py"
D, F, LAYERS = 12, 48, 2
NAMES = [f"{kind}{skip}" for kind in KINDS if kind not in ("topk", "abstopk") for skip in ("", "-skip")]  # SAELens has no TopK transcoder

pytestmark = [pytest.mark.peers, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Every kind trained for a few steps on both MLPs of a tiny model, and what the others compute with what was saved."""
    if not PEERS.exists():
        pytest.skip("no environment .peers with SAELens and circuit-tracer; make bench-peers creates it")
    folder = tmp_path_factory.mktemp("trained_transcoders")
    torch.manual_seed(0)
    settings = dict(vocab_size=40, n_positions=16, n_embd=D, n_layer=LAYERS, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**settings, initializer_range=0.4)).save_pretrained(folder / "lm")
    ids = torch.randint(1, 40, (200 * 21,), dtype=torch.int32)
    save_file({"ids": ids, "document_starts": torch.arange(0, len(ids) + 1, 21)}, folder / "ids.safetensors")
    sites = tuple(f"{site}.{layer}" for layer in range(LAYERS) for site in ("mlp_in", "mlp_out"))
    text, model = (str(folder / "ids.safetensors"),), str(folder / "lm")
    harvest(HarvestConfig(text=text, model=model, out=folder / "cache", sites=sites, context=12, tokens=4000))
    (folder / "plan.json").write_text(json.dumps([run(name, layer) for name in NAMES for layer in range(LAYERS)]))
    sizes = dict(d_sae=F, steps=60, batch_size=64, lr=1e-2, dead_steps=20, device="cpu")
    train_plan(PlanConfig(cache=folder / "cache", plan=folder / "plan.json", out=folder / "ours", **sizes))
    for name in NAMES:
        parts = tuple(str(folder / "ours" / f"{name}.{layer}") for layer in range(LAYERS))
        export_transcoders(TranscodersConfig(dictionaries=parts, out=folder / "sets" / name, model_name="gpt2"))
    cache = ActivationCache.open(folder / "cache", "mlp_in.0")
    save_file({"x": cache.read(cache.shards("train")[0])[0][:50].float().contiguous()}, folder / "x.safetensors")
    (folder / "outputs" / "ours").mkdir(parents=True)
    read = [f"ours/{name}.{layer}" for name in NAMES for layer in range(LAYERS)]
    (folder / "cases.json").write_text(json.dumps({"write": {}, "train": {}, "read": read}))
    for side in SIDES:
        result = subprocess.run([PEERS, side, folder], capture_output=True, text=True, cwd="/")
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


def run(name, layer):
    kind = name.removesuffix("-skip")
    swept = {"l1": [0.2], "k": [4], "target_l0": [4.0]}[KINDS[kind]().swept]
    at = {"reads": [f"mlp_in.{layer}"], "writes": [f"mlp_out.{layer}"], "skip": name.endswith("-skip")}
    return {"name": f"{name}.{layer}", "kind": kind, KINDS[kind]().swept: swept, **at}


@pytest.mark.parametrize("name", NAMES)
def test_the_others_compute_what_was_trained(shared, name):
    x = load_file(shared / "x.safetensors")["x"]
    of_set = load_file(shared / "circuit-tracer" / f"{name}.safetensors")
    for layer in range(LAYERS):
        dictionary = Dictionary.load(shared / "ours" / f"{name}.{layer}")
        assert (dictionary.W_skip_od is not None) == name.endswith("-skip")
        saelens = load_file(shared / "outputs" / "ours" / f"{name}.{layer}.safetensors")
        for acts, out in ((saelens["acts"], saelens["out"]), (of_set[f"acts.{layer}"], of_set[f"out.{layer}"])):
            assert 0 < (acts != 0).float().mean() < 1
            torch.testing.assert_close(dictionary.encode(x), acts, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(dictionary(x), out, rtol=1e-5, atol=1e-4)
        read = json.loads((shared / "registry.json").read_text())["read"][f"ours/{name}.{layer}"]
        relu = name.startswith(("relu", "p-annealing"))
        assert read["architecture"] == ("" if relu else "jumprelu_") + ("skip_" if name.endswith("-skip") else "") + "transcoder"
