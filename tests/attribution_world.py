"""Sets of transcoders that need no training: random ones, and the neurons of a ReLU model, which stand in for its MLPs exactly."""

import torch
import transformers as hf
from test_language_model import randomised

from sae.dictionaries.dictionary import Dictionary
from sae.model.language_model import LanguageModel
from steering.circuits.attribution.edges import LinearModel
from steering.circuits.attribution.replacement import LocalReplacement
from steering.circuits.attribution.transcoders import checked


def random_set(lm: LanguageModel, kind: str = "mlp_in", skip: bool = False, f: int = 16) -> dict[int, Dictionary]:
    found = {}
    for layer in range(lm.n_layers):
        generator, d = torch.Generator().manual_seed(layer), lm.d_model

        def draw(*shape: int, generator=generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(lm.dtype) * 0.3

        metadata = {"site": f"{kind}.{layer}", "site_out": f"mlp_out.{layer}"}
        own = {"b_in_d": draw(d), "W_skip_od": draw(d, d) if skip else None, "metadata": metadata}
        found[layer] = Dictionary(draw(f, d), draw(f) - 0.5, draw(f, d), draw(d), **own).requires_grad_(False)
    return found


def relu_gpt2() -> LanguageModel:
    config = hf.GPT2Config(
        vocab_size=48,
        n_positions=32,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_inner=24,
        activation_function="relu",
        bos_token_id=None,
        eos_token_id=None,
    )
    lm = randomised(config, seed=3, name="relu gpt2")
    return LanguageModel(lm.model.double(), name=lm.name)


def neurons(lm: LanguageModel) -> dict[int, Dictionary]:
    """A GPT-2's own neurons as transcoders: exact where the activation is a ReLU."""
    found = {}
    for layer, block in enumerate(lm.model.transformer.h):
        metadata = {"site": f"mlp_in.{layer}", "site_out": f"mlp_out.{layer}"}
        fc, proj = block.mlp.c_fc, block.mlp.c_proj
        matrices = (fc.weight.T.clone(), fc.bias.clone(), proj.weight.clone(), proj.bias.clone())
        found[layer] = Dictionary(*matrices, metadata=metadata).requires_grad_(False)
    return found


def linear_model(lm: LanguageModel, found: dict[int, Dictionary], ids_sp: torch.Tensor, skip_positions: int = 0) -> LinearModel:
    return LinearModel(LocalReplacement(lm, checked(lm, found, "the set"), ids_sp, skip_positions))
