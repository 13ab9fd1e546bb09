"""SAEDashboard's own runner on a local model and given tokens, a batch of features for every line on standard input; runs in .peers.

It loads its model from a hub by name and its tokens from a data set: those two steps are replaced, everything it measures is its own.
Answers lines of JSON: {"ready"}, then {"features", "seconds", "peak_mib"} for every batch.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from answers import Answer, answering


def make_runner(settings: dict[str, Any]) -> Any:
    from sae_dashboard.neuronpedia.neuronpedia_runner import NeuronpediaRunner
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from safetensors.torch import load_file

    tokens_sp = load_file(settings["tokens"])["tokens"]

    class Runner(NeuronpediaRunner):
        def _initialize_model(self) -> None:
            self.model = hooked_model(settings["model"])
            self.hook_name = self.sae.cfg.metadata["hook_name"]

        def _setup_activation_store(self) -> None:
            self.activations_store = None  # only gives tokens
            self.cached_activations_dir = Path(settings["folder"]) / "cached_activations"

        def get_tokens(self) -> torch.Tensor:
            return tokens_sp

        def create_output_directory(self) -> str:
            Path(settings["out"]).mkdir(parents=True, exist_ok=True)
            return settings["out"]

    return Runner(
        NeuronpediaRunnerConfig(
            sae_set="res",
            sae_path=settings["dictionary"],
            outputs_dir=settings["out"],
            from_local_sae=True,
            n_prompts_total=len(tokens_sp),
            n_tokens_in_prompt=tokens_sp.shape[1],
            huggingface_dataset_path="none",
            sae_device="cpu",
            model_device="cpu",
            activation_store_device="cpu",
        )
    )


def hooked_model(folder: str) -> Any:
    """The GPT-2 in a local folder as TransformerLens has it; the loader by name knows only published models."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = theirs.config
    config = HookedTransformerConfig(
        n_layers=given.n_layer,
        d_model=given.n_embd,
        d_head=given.n_embd // given.n_head,
        n_heads=given.n_head,
        n_ctx=given.n_positions,
        d_vocab=given.vocab_size,
        act_fn=given.activation_function,
        eps=given.layer_norm_epsilon,
        normalization_type="LN",
        device="cpu",
    )
    model = HookedSAETransformer(config, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_state_dict(convert_gpt2_weights(theirs, config), strict=False)
    return model


def serve(settings: dict[str, Any], answer: Answer) -> None:
    torch.set_num_threads(settings["threads"])
    runner = make_runner(settings)
    answer(ready=True)
    for number, _ in enumerate(sys.stdin):
        runner.cfg.start_batch = runner.cfg.end_batch = number
        runner.activations_store = None  # which `run` deletes
        start = time.monotonic()
        runner.run()
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer(features=runner.cfg.n_features_at_a_time, seconds=seconds, peak_mib=peak)


if __name__ == "__main__":
    answering(serve)
