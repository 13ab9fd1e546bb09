"""Runs in the peers' environment: SAELens writes folders of the kinds it is asked for, with its own outputs, and opens folders given to it.

The one argument is a folder with x.safetensors and cases.json. `write` and `train` name dictionaries to make, in theirs/NAME; `read` names
folders to open. What SAELens computes for x is in outputs/NAME.safetensors, or what it refused in registry.json.
"""

import json
import sys
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file

HEADS = 3


def made(registry, architecture, cfg, metadata):
    torch.manual_seed(len(architecture) + len(metadata))
    sae_class, cfg_class = registry[architecture]
    sae = sae_class(cfg_class(**cfg, metadata=SAEMetadata(**metadata)))
    for name, p in sae.named_parameters():
        p.data = torch.rand_like(p) if name == "threshold" else torch.randn_like(p) / 3
    return sae


def compute(sae, x, path):
    heads = sae.cfg.reshape_activations == "hook_z"
    x = x.unflatten(-1, (HEADS, -1)) if heads else x
    acts, out = sae.encode(x), sae(x)
    save_file({"acts": acts.detach().contiguous(), "out": (out.flatten(-2) if heads else out).detach().contiguous()}, path)


def train(folder, name, case, x):
    """A checkpoint as SAELens leaves it in training, before it folds what it estimated of the activations, and the inference folder."""
    sae = made(SAE_TRAINING_CLASS_REGISTRY, case["architecture"], case["cfg"], case["metadata"])
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold = torch.tensor(0.4, dtype=torch.double)
    scaler = ActivationScaler(scaling_factor=case["scaling_factor"])
    if case["whitens"]:
        scaler.estimate_whitening(x.shape[1], iter([x]), 1)
    sae.save_model(folder / "theirs" / name)
    scaler.save(str(folder / "theirs" / name / "activation_scaler.json"))
    if case["scaling_factor"] is not None:
        sae.fold_activation_norm_scaling_factor(case["scaling_factor"])
    if case["whitens"]:
        sae.fold_activation_whitening(scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix)
    sae.save_inference_model(folder / "theirs" / f"{name} inference")
    return SAE.load_from_disk(folder / "theirs" / f"{name} inference")


def main(folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text())
    x = load_file(folder / "x.safetensors")["x"]
    outputs = folder / "outputs"
    read = {}
    for name, case in cases["write"].items():
        sae = made(SAE_CLASS_REGISTRY, case["architecture"], case["cfg"], case["metadata"])
        sae.save_model(folder / "theirs" / name)
        if case["architecture"] not in ("temporal", "matching_pursuit"):
            compute(sae, x, outputs / f"{name}.safetensors")
    for name, case in cases["train"].items():
        compute(train(folder, name, case, x), x, outputs / f"{name}.safetensors")
    for name in cases["read"]:
        sae = SAE.load_from_disk(folder / name)
        compute(sae, x, outputs / f"{name}.safetensors")
        read[name] = {"architecture": sae.cfg.architecture(), **sae.cfg.metadata.to_dict()}
    registry = {"inference": list(SAE_CLASS_REGISTRY), "training": list(SAE_TRAINING_CLASS_REGISTRY), "read": read}
    (folder / "registry.json").write_text(json.dumps(registry))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
