"""Tiny random models in float64, with what Hugging Face computes in float32 whatever the dtype computed in float64 too.

s sequences · p positions · v vocabulary
"""

import copy
import functools

import pytest
import torch
from test_language_model import CONFIGS, tiny
from test_sites import made

from sae.model.language_model import LanguageModel
from steering.circuits.model_graph.engine import Engine

FAMILIES = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "gptj",
    "phi",
    "mixtral",
    "granite",
    "opt",
)
P = 6


def exact_rms_norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    gain = 1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


@pytest.fixture
def exact(monkeypatch):
    """Makes the float64 model of a family."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)
    )

    def make(family: str) -> LanguageModel:
        model = copy.deepcopy(tiny(family).model if family in CONFIGS else made(family).model).double()
        if hasattr(model.config, "num_local_experts"):
            model.set_experts_implementation("eager")  # the other kernels know no float64
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                monkeypatch.setattr(type(module), "forward", exact_rms_norm)
        return LanguageModel(model, name=family)

    return make


@functools.cache
def engine_of(family: str) -> Engine:
    """In float32."""
    return Engine(tiny(family) if family in CONFIGS else made(family))


def logit_difference(logits_spv: torch.Tensor) -> torch.Tensor:
    return logits_spv[:, -1, 3] - logits_spv[:, -1, 7]


def hooks_of(lm: LanguageModel) -> int:
    """Hooks on the model's modules; some are transformers' own, once any test has asked the same model for hidden states."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
