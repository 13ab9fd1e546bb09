"""Runs in the peers' environment: circuit-tracer's own loader opens sets of transcoders, and computes with each layer.

The one argument is a folder with x.safetensors and sets/NAME; what it computes is in circuit-tracer/NAME.safetensors.
"""

import sys
from pathlib import Path

import huggingface_hub.constants
import torch
from safetensors.torch import load_file, save_file

huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False  # its release asks for an older huggingface_hub, which had this name
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub  # noqa: E402


def main(folder: Path) -> None:
    x = load_file(folder / "x.safetensors")["x"]
    (folder / "circuit-tracer").mkdir()
    for place in sorted((folder / "sets").iterdir()):
        transcoders, _ = load_transcoder_from_hub(str(place.resolve()), torch.device("cpu"))  # as its replacement model does
        with torch.no_grad():
            found = {}
            for layer, transcoder in enumerate(transcoders):
                acts = transcoder.encode(x)
                found |= {f"acts.{layer}": acts, f"out.{layer}": transcoder.decode(acts, x)}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "circuit-tracer" / f"{place.name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
