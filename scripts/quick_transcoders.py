"""Make a set of per-layer transcoders without training, to try attribution graphs: random features, decoders by least squares.

A feature's encoder row is the MLP's input at some token minus the mean; its bias lets the `l0` largest of all features pass at a
token on average. Decoders are the ridge regression of what the MLP adds. Such features mean nothing; trained ones are better at both
sparsity and error.

b tokens · d width of the stream · f features
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae.command_line import run
from sae.dictionaries.formats.trainers.circuit_tracer_writer import save_set
from sae.dictionaries.gates import Threshold
from sae.dictionaries.parts import Parts
from sae.disk.places import require_folder
from sae.errors import InputError
from sae.model.language_model import LanguageModel

RIDGE = 0.01
"""of the mean square of the activations"""


@dataclass(kw_only=True)
class QuickConfig:
    model: str
    """Model by hub name, folder or GGUF file."""
    text: Path
    """Text file to fit on."""
    out: Path
    """Empty folder for the set, in circuit-tracer's layout."""
    features: int = 1024
    """Features of each layer."""
    l0: int = 32
    """Average number of active features per token."""
    tokens: int = 8192
    """Tokens to fit on."""
    context: int = 128
    """Tokens per sequence."""
    seed: int = 0
    """Seed of the features."""


def make_transcoders(config: QuickConfig) -> None:
    """Writes the set. Raises `InputError` for too little text and for a folder that cannot be written."""
    require_folder(config.out)
    if not 0 < config.l0 < config.features <= config.tokens:
        raise InputError(
            f"expected fewer active features than features, and no more of these than tokens, got {config.l0}, {config.features} and "
            f"{config.tokens}"
        )
    lm = LanguageModel.load(config.model)
    ids = lm.token_ids(config.text.read_text(encoding="utf-8"))[1:]
    rows = config.tokens // config.context
    if len(ids) < rows * config.context:
        raise InputError(f"expected a text of at least {rows * config.context} tokens, got {len(ids)}; give a longer one")
    ids_sp = torch.tensor(ids[: rows * config.context]).view(rows, config.context).to(lm.device)
    config.out.mkdir(parents=True, exist_ok=True)
    save_set(transcoders(lm, ids_sp, config), config.out, config.model)


def transcoders(lm: LanguageModel, ids_sp: Tensor, config: QuickConfig) -> Iterator[Parts]:
    """Fits one layer after another. Each records its own activations, so that only one layer's are in memory."""
    generator = torch.Generator().manual_seed(config.seed)
    for layer in range(lm.n_layers):
        sites = [f"mlp_in.{layer}", f"mlp_out.{layer}"]
        parts = [lm.record(part_sp, sites) for part_sp in ids_sp.split(16)]
        x_bd, y_bd = (torch.cat([part[site] for part in parts])[:, 1:].flatten(0, 1).float() for site in sites)
        yield fitted(x_bd, y_bd, config, generator, {"site": sites[0], "site_out": sites[1], "model_name": lm.name})


def fitted(x_bd: Tensor, y_bd: Tensor, config: QuickConfig, generator: torch.Generator, metadata: dict) -> Parts:
    chosen_f = torch.randperm(len(x_bd), generator=generator)[: config.features].to(x_bd.device)
    W_enc_fd = torch.nn.functional.normalize(x_bd[chosen_f] - x_bd.mean(0), dim=-1)
    z_bf = x_bd @ W_enc_fd.T
    b_enc_f = -z_bf.quantile(1 - config.l0 / config.features, dim=0)
    acts_bf = (z_bf + b_enc_f).relu()
    mean_f, b_dec_d = acts_bf.mean(0), y_bd.mean(0)
    gram_ff = (acts_bf - mean_f).T @ (acts_bf - mean_f)
    gram_ff.diagonal().add_(RIDGE * float(acts_bf.square().mean()) * len(acts_bf))
    W_dec_fd = torch.linalg.solve(gram_ff, (acts_bf - mean_f).T @ (y_bd - b_dec_d))
    b_dec_d = b_dec_d - mean_f @ W_dec_fd
    error = float((acts_bf @ W_dec_fd + b_dec_d - y_bd).square().sum() / (y_bd - y_bd.mean(0)).square().sum())
    print(f"{metadata['site']}: L0 {float((acts_bf > 0).sum(1).float().mean()):.1f}, FVU {error:.2f} on the fitted text", file=sys.stderr)
    return Parts(W_enc_fd, b_enc_f, W_dec_fd, b_dec_d, Threshold(), metadata)


if __name__ == "__main__":
    run(make_transcoders, QuickConfig, __doc__ or "")
