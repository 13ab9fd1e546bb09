"""What `sae train` saves of every kind, opened by SAELens, which computes the same (run `make bench-peers` first)."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.activations.imports.command import ImportConfig, import_activations
from sae.dictionaries.dictionary import Dictionary
from sae.kinds import KINDS
from sae.training import TrainingConfig, train

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers" / "bin" / "python"
D, F = 12, 48

pytestmark = [pytest.mark.peers, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Every kind trained for a few steps on sums of a few of 30 directions, and what SAELens computes with what was saved."""
    if not PEERS.exists():
        pytest.skip("no environment .peers with SAELens; make bench-peers creates it")
    folder = tmp_path_factory.mktemp("trained_kinds")
    g = torch.Generator().manual_seed(0)
    code_nf = torch.rand(4000, 30, generator=g) * (torch.rand(4000, 30, generator=g) < 0.1)
    x_nd = code_nf @ torch.randn(30, D, generator=g) * 7 + torch.randn(D, generator=g)
    np.save(folder / "rows.npy", x_nd.numpy())
    cache = import_activations(ImportConfig(source=(folder / "rows.npy",), out=folder / "cache", site="resid_post.2", held_out=0.3))
    for name, kind in KINDS.items():
        swept = {"l1": (0.5,), "k": (4,), "target_l0": (4.0,)}[kind().swept]
        made = kind(**{kind().swept: swept})
        sizes = dict(d_sae=F, steps=80, batch_size=64, lr=1e-2, dead_steps=20)
        train(TrainingConfig(cache=cache, out=folder / "ours" / name, kind=made, device="cpu", **sizes))
    save_file({"x": x_nd[:50].contiguous()}, folder / "x.safetensors")
    (folder / "outputs" / "ours").mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps({"write": {}, "train": {}, "read": [f"ours/{name}" for name in KINDS]}))
    side = ROOT / "tests" / "dictionaries" / "formats" / "saelens_side.py"
    result = subprocess.run([PEERS, side, folder], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_saelens_computes_what_was_trained(shared, name):
    dictionary = Dictionary.load(shared / "ours" / name)
    theirs = load_file(shared / "outputs" / "ours" / f"{name}.safetensors")
    x = load_file(shared / "x.safetensors")["x"]
    assert 0 < (theirs["acts"] != 0).float().mean() < 1
    torch.testing.assert_close(dictionary.encode(x), theirs["acts"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dictionary(x), theirs["out"], rtol=1e-5, atol=1e-4)
    read = json.loads((shared / "registry.json").read_text())["read"][f"ours/{name}"]
    expected = {"topk": "topk", "abstopk": "abstopk", "relu": "standard", "p-annealing": "standard"}
    assert read["architecture"] == expected.get(name, "jumprelu")  # what has one threshold a feature
    assert read["hook_name"] == "blocks.2.hook_resid_post"
