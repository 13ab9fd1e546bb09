"""Facts in SAELens' list of published dictionaries (pretrained_saes.yaml) that are missing in the dictionaries' own folders.

If they were missing, activations would be normalised differently than in training, or not at all.
"""

from pathlib import Path
from typing import Any

from sae.dictionaries.formats.tensors import name_of

CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
# config_overrides, by the name of the repository
SETTINGS: dict[str, dict[str, Any]] = {
    "GPT2-Small-SAEs-Reformatted": CENTRED,
    "GPT2-Small-Feature-Splitting-Experiment-Layer-8": CENTRED,
    "gpt2-small-mlp-out-saes": CENTRED,
    "Mistral-7B-Residual-Stream-SAEs": {"normalize_activations": "constant_norm_rescale"},
}
# norm_scaling_factor, by repository and folder; those of Llama Scope stand in its own files
FACTORS = {
    "Gemma-2b-Residual-Stream-SAEs": {"gemma_2b_blocks.12.hook_resid_post_16384": 0.21381938399317255},
    "gpt2-small-mlp-out-saes": {
        "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1": 1.049317316132615,
        "sae_group_gpt2_blocks.1.hook_mlp_out_24576:v0": 2.3693984005104283,
        "sae_group_gpt2_blocks.2.hook_mlp_out_24576:v0": 1.6411934982190302,
        "sae_group_gpt2_blocks.3.hook_mlp_out_24576:v0": 1.8958522157897557,
        "sae_group_gpt2_blocks.4.hook_mlp_out_24576:v0": 1.81673478700627,
        "sae_group_gpt2_blocks.5.hook_mlp_out_24576:v0": 1.550234472245924,
        "sae_group_gpt2_blocks.6.hook_mlp_out_24576:v0": 1.3237742807210804,
        "sae_group_gpt2_blocks.7.hook_mlp_out_24576:v0": 1.1042905114723296,
        "sae_group_gpt2_blocks.8.hook_mlp_out_24576:v1": 0.9123762783479742,
        "sae_group_gpt2_blocks.9.hook_mlp_out_24576:v0": 0.6955335635232373,
        "sae_group_gpt2_blocks.10.hook_mlp_out_24576:v0": 0.3619728926727644,
        "sae_group_gpt2_blocks.11.hook_mlp_out_24576:v2": 0.2851548652550073,
    },
}


def settings_of(folder: Path) -> dict[str, Any]:
    """Settings that replace those in cfg.json; a local copy is recognised by the repository's name above it."""
    repository, _ = split(folder)
    return SETTINGS.get(repository, {})


def factor_of(folder: Path) -> float | None:
    """The factor of the activations."""
    repository, name = split(folder)
    return FACTORS.get(repository, {}).get(name)


def split(folder: Path) -> tuple[str, str]:
    """Names of the repository and of the folder in it."""
    above, _, name = name_of(folder).rpartition("/")
    return above.rpartition("/")[2], name
