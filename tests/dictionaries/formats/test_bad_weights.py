"""Damaged, foreign and hostile weights in the layout of every tool: one sentence, and nothing out of the file is run."""

import re

import pytest
import test_bussmann
import test_crosscoders
import test_dictionary_learning
import test_goodfire
import test_kissane_attention
import test_llama_scope
import test_openai
import test_qwen_scope
import test_sparsify
import torch
from safetensors.torch import load_file, save_file

from sae.dictionaries.dictionary import Dictionary
from sae.errors import InputError


def kissane(path):
    test_crosscoders.kissane(path, hook_point="blocks.1.hook_resid_pre")
    return path


GOODFIRE = "Llama-3.1-8B-Instruct-SAE-l19.pth"
ALONE = ("0.pt", "layer0.sae.pt", test_kissane_attention.NAME)
"""files whose folder is no dictionary"""

# a whole dictionary, and its file of weights
LAYOUTS = {
    "sparsify": (lambda path: test_sparsify.folder(path / "layers.0", test_sparsify.weights()), "sae.safetensors"),
    "crosscoder_learning": (lambda path: test_crosscoders.write(path, test_crosscoders.thresholded("SAE")), "model_final.pt"),
    "kissane": (kissane, "cc_weights.pt"),
    "bussmann": (lambda path: test_bussmann.folder(path / "sae", "topk", test_bussmann.weights("topk")), "sae.pt"),
    "llama scope": (lambda path: test_llama_scope.version_1(path / "x", weights_in="sae_weights.safetensors"), "sae_weights.safetensors"),
    "llamascopium": (lambda path: test_llama_scope.version_2(path / "x"), "sae_weights.safetensors"),
    "qwen scope": (lambda path: test_qwen_scope.write(path / test_qwen_scope.NAME), "layer0.sae.pt"),
    "goodfire": (lambda path: test_goodfire.write(path / GOODFIRE, test_goodfire.linear("_linear")).parent, GOODFIRE),
    "attention of kissane": (
        lambda path: test_kissane_attention.write(path / test_kissane_attention.NAME).parent,
        test_kissane_attention.NAME,
    ),
    "openai": (lambda path: test_openai.write(path / "0.pt", test_openai.state()).parent, "0.pt"),
} | {
    name: (lambda path, name=name: test_dictionary_learning.folder(path / name, name, test_dictionary_learning.state(name)), "ae.pt")
    for name in test_dictionary_learning.SHAPES
}


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=LAYOUTS)
def weights(request, tmp_path):
    write, name = LAYOUTS[request.param]
    file = write(tmp_path) / name
    assert Dictionary.load(file if file.name in ALONE else file.parent).d_sae == 12
    return file


def read(file):
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def refused(file, message):
    for path in (file, file.parent)[: 1 if file.name in ALONE else 2]:
        with pytest.raises(InputError, match=message) as error:
            Dictionary.load(path)
        assert "\n" not in str(error.value)


def matrix(state):
    return next(name for name, tensor in state.items() if isinstance(tensor, torch.Tensor) and tensor.dim() > 1)


def test_tensors_that_do_not_fit(weights):
    state = dict(read(weights))
    name, save = matrix(state), save_file if weights.suffix == ".safetensors" else torch.save
    broken = state[name].clone()
    broken[..., -1] = torch.nan
    for change, message in (
        ({name: broken}, f"{name} in .* holds NaN or infinity"),
        ({name: state[name][..., :-1].clone()}, "of shape"),
        ({name: state[name].unsqueeze(0)}, "of shape"),
        ({name: state[name].long()}, "of floating point"),
        ({"rotation": torch.ones(3)}, "holds rotation"),
    ):
        save(state | change, weights)
        refused(weights, message)
    del state[name]
    save(state, weights)
    refused(weights, f"lacks {name}|found no known format")


def test_a_file_that_is_cut_off(weights):
    data = weights.read_bytes()
    for end in (0, 100, len(data) - 1):
        weights.write_bytes(data[:end])
        refused(weights, re.escape(weights.name))


def test_a_file_that_wants_to_run_code(weights, tmp_path):
    if weights.suffix == ".safetensors":
        pytest.skip("safetensors holds no code")
    state = dict(read(weights))
    for hostile in (Hostile(tmp_path / "ran"), state | {matrix(state): Hostile(tmp_path / "ran")}):
        torch.save(hostile, weights)
        refused(weights, "reading that would run code out of the file")
    assert not (tmp_path / "ran").exists()
