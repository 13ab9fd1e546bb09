"""Single files of Goodfire and qresearch: `MODEL-SAE-lN.pt` or `.pth`, which read and write the residual stream after block N.

| of | tensors | acts | y |
|---|---|---|---|
| Goodfire's Llama | encoder_linear, decoder_linear | relu(W_e x + b_e) | W_d acts + b_d |
| qresearch's Llama and R1-Distill | encoder, decoder | relu(W_e x + b_e) | W_d acts + b_d |
| Goodfire's DeepSeek-R1 | W, b_enc, b_dec | the k largest of relu(x W + b_enc) | acts Wᵀ + b_dec |

(Model cards; sae.py of goodfire-ai/r1-interpretability.) R1's k is one of a batch, 128 in the folder math and 64 in logic.
d width · f features
"""

import re
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.dictionaries.formats.tensors import Device, checked, name_of, names_in, read_weights, require_k
from sae.dictionaries.gates import Gate, Threshold, TopK
from sae.dictionaries.parts import Parts
from sae.errors import InputError

FILES = "MODEL-SAE-lN.pt or .pth"
ENDINGS = (".pt", ".pth")
TIED = {"W": "d f", "b_enc": "f", "b_dec": "d"}
LAYOUTS = (
    {"encoder_linear.weight": "f d", "encoder_linear.bias": "f", "decoder_linear.weight": "d f", "decoder_linear.bias": "d"},
    {"encoder.weight": "f d", "encoder.bias": "f", "decoder.weight": "d f", "decoder.bias": "d"},
    TIED,
)
NAME = re.compile(r"((?:Llama|DeepSeek)-[\w.-]+?)-SAE-l([0-9]+)\.pth?$")
OWNERS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}
KEPT = {"math": 128, "logic": 64}
"""features of a token in the mean, by the folder in the repository of DeepSeek-R1"""
PROMISED = {"Llama-3.1-8B-Instruct": 91, "Llama-3.3-70B-Instruct": 121, "DeepSeek-R1-Distill-Llama-8B": 93, "Llama-3.2-1B-Instruct": 63}
"""L0 that the model cards name"""


def recognises(path: Path) -> bool:
    file = file_of(path)
    if file is None or file.suffix not in ENDINGS:
        return False
    return NAME.search(file.name) is not None or any(set(layout) <= names_in(file) for layout in LAYOUTS if layout is not LAYOUTS[1])


def file_of(path: Path) -> Path | None:
    """The file itself, or the only one of such a name in a folder."""
    if path.is_file():
        return path
    files = [file for file in path.iterdir() if NAME.search(file.name)]
    return files[0] if len(files) == 1 else None


def load(path: Path, device: Device = "cpu") -> Parts:
    file = file_of(path)
    assert file is not None
    state = read_weights(file)
    shapes = next((layout for layout in LAYOUTS if next(iter(layout)) in state), LAYOUTS[0])
    w = {key: tensor.to(device) for key, tensor in checked(file, state, shapes).items()}
    facts = facts_of(file)
    if shapes is TIED:
        return Parts(w["W"].T, w["b_enc"], w["W"].T.contiguous(), w["b_dec"], kept(file, w["b_enc"]), facts)
    W_enc_fd, b_enc_f, W_dec_df, b_dec_d = w.values()
    return Parts(W_enc_fd, b_enc_f, W_dec_df.T.contiguous(), b_dec_d, Threshold(), facts)


def kept(file: Path, b_enc_f: Tensor) -> Gate:
    """Raises `InputError` if no folder states how many features are kept."""
    name = file.absolute().parent.name
    if name not in KEPT:
        raise InputError(
            f"expected {file} in a folder math or logic, as in Goodfire/DeepSeek-R1-SAE-l37, because only that says how many features a "
            f"token keeps, found it in {name}; name the folder so"
        )
    k = require_k(file, "k", KEPT[name], len(b_enc_f))
    print(f"{file} keeps {k} features of a token in the mean over a batch; here each token keeps its {k} largest", file=sys.stderr)
    return TopK(k)


def facts_of(file: Path) -> dict[str, Any]:
    """Site and model, as far as the name states them."""
    found = NAME.search(name_of(file))
    if found is None:
        return {}
    promised = {"promised": {"l0": PROMISED[found[1]]}} if found[1] in PROMISED else {}
    return {"model_name": f"{OWNERS[found[1].partition('-')[0]]}/{found[1]}", "site": f"resid_post.{int(found[2])}"} | promised
