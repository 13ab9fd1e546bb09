"""What dictionary_learning and sparsify train and save, computed there and here (run `make bench-peers` first)."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import GroupMax, TopK

PEERS = Path(__file__).resolve().parents[3] / ".peers" / "bin" / "python"
D, F = 8, 24

# every trainer of dictionary_learning, for a few steps on activations that it normalises and folds back; then sparsify's classes
TRAIN = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from dictionary_learning import trainers
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from sparsify import SparseCoder, SparseCoderConfig

out, D, F = Path(sys.argv[1]), 8, 24
torch.manual_seed(0)
basis = torch.randn(40, D)
data = [torch.randn(64, 40).relu() @ basis * 3 for _ in range(300)]
x = data.pop()
common = dict(activation_dim=D, dict_size=F, layer=3, lm_name="some/llama", submodule_name="resid_post_layer_3", device="cpu", steps=8)
short = dict(warmup_steps=2, sparsity_warmup_steps=2)
top = dict(k=4, warmup_steps=2, threshold_start_step=1)
kinds = [
    (trainers.StandardTrainer, short),
    (StandardTrainerAprilUpdate, short),
    (trainers.PAnnealTrainer, dict(anneal_start=2, **short)),
    (trainers.GatedSAETrainer, short),
    (GatedAnnealTrainer, dict(anneal_start=2, **short)),
    (trainers.JumpReluTrainer, dict(sparsity_penalty=0.1, target_l0=4.0, **short)),
    (trainers.TopKTrainer, top),
    (BatchTopKTrainer, top),
    (MatryoshkaBatchTopKTrainer, dict(group_fractions=[0.25, 0.75], **top)),
]
configs = []
for kind, more in kinds:
    names = kind.__init__.__code__.co_varnames
    configs.append(dict(trainer=kind, **{key: value for key, value in {**common, **more}.items() if key in names}))
trainSAE(data, configs, 8, save_dir=str(out), normalize_activations=True, device="cpu")
new = AutoEncoderNew(D, F)
new.encoder.bias.data.normal_(), new.decoder.bias.data.normal_()
(out / "trainer_9").mkdir()
torch.save(new.state_dict(), out / "trainer_9" / "ae.pt")
settings = {"dict_class": "AutoEncoderNew", "trainer_class": "StandardTrainerNew", "layer": 3, "lm_name": "some/llama"}
(out / "trainer_9" / "config.json").write_text(json.dumps({"trainer": settings}))
found = {"x": x}
for i in range(10):
    ae, _ = load_dictionary(str(out / f"trainer_{i}"), "cpu")
    acts = ae.encode(x)
    found |= {f"trainer_{i}.acts": acts.detach().contiguous(), f"trainer_{i}.out": ae.decode(acts).detach().contiguous()}
for name, more in {"topk": {}, "groupmax": {"activation": "groupmax"}, "skip": {"transcode": True, "skip_connection": True}}.items():
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=4, **more))
    for p in sae.parameters():
        p.data = torch.randn_like(p)
    sae.save_to_disk(out / name / "layers.3.mlp")
    result = sae(x)
    acts = torch.zeros(len(x), F).scatter_(1, result.latent_indices, result.latent_acts)
    found |= {f"{name}.acts": acts.detach(), f"{name}.out": result.sae_out.detach()}
save_file(found, out / "values.safetensors")
"""

pytestmark = [pytest.mark.peers, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    if not PEERS.exists():
        pytest.skip("no environment .peers with dictionary_learning and sparsify; make bench-peers creates it")
    out = tmp_path_factory.mktemp("theirs")
    result = subprocess.run([PEERS, "-c", TRAIN, out], capture_output=True, text=True, cwd="/", check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return out


def same(folder: Path, values: dict, name: str) -> Dictionary:
    ours = Dictionary.load(folder)
    torch.testing.assert_close(ours.encode(values["x"]), values[f"{name}.acts"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(values["x"]), values[f"{name}.out"], rtol=1e-5, atol=1e-5)
    assert (values[f"{name}.acts"] != 0).any()
    return ours


def test_dictionary_learning(theirs):
    values = load_file(theirs / "values.safetensors")
    gates = {}
    for i in range(10):
        trainer = json.loads((theirs / f"trainer_{i}" / "config.json").read_text())["trainer"]
        ours = same(theirs / f"trainer_{i}", values, f"trainer_{i}")
        gates[trainer["trainer_class"]] = type(ours.gate)
        assert ours.metadata["model_name"] == "some/llama"
        assert ours.site == ("resid_post.3" if "submodule_name" in trainer else None)
    assert len(gates) == 10
    assert {name for name, gate in gates.items() if gate is TopK} == {"TopKTrainer"}


def test_sparsify(theirs):
    values = load_file(theirs / "values.safetensors")
    gates = [(name, type(same(theirs / name / "layers.3.mlp", values, name).gate)) for name in ("topk", "groupmax", "skip")]
    assert gates == [("topk", TopK), ("groupmax", GroupMax), ("skip", TopK)]
