"""Measure a set of transcoders, or a cross-layer transcoder, in the model itself: what all its layers write together at each site.

The cache provides the held-out text and the positions that count; it need not hold the sites. The reconstruction is measured in the clean
model: each layer reads what it would read there. The loss is that of the model whose every written site is replaced.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.bundle import Bundle
from sae.dictionaries.dictionary import Dictionary
from sae.disk.writing import jsonable
from sae.errors import InputError
from sae.evaluation.language_model_loss import LanguageModelLoss, batches, language_model_loss, padded
from sae.evaluation.reconstruction import ReconstructionMetrics
from sae.evaluation.settings import EvaluationConfig, Text, held_out_text, refuse_training_tokens
from sae.evaluation.splice import Splice, require_widths
from sae.pieces import Pieces, results, stretches

if TYPE_CHECKING:
    from rich.table import Table


class Comparison(NamedTuple):
    """The set's outputs in the clean model, compared with the actual values."""

    rows: int
    """positions compared"""
    sites: dict[str, ReconstructionMetrics]
    fired: list[Tensor]
    """positions on which each feature fires, int64 [f], for each dictionary"""

    @classmethod
    def of(cls, dictionaries: Sequence[Dictionary]) -> "Comparison":
        widths = {str(port.site): port.width for dictionary in dictionaries for port in dictionary.writes}
        none_f = torch.zeros(0, device=dictionaries[0].W_dec_fo.device)  # features are counted by layer, not by site
        sites = {site: ReconstructionMetrics(none_f, width) for site, width in widths.items()}
        return cls(0, sites, [torch.zeros(dictionary.d_sae, dtype=torch.int64, device=none_f.device) for dictionary in dictionaries])


def evaluate_bundle(
    config: EvaluationConfig, bundle: Bundle, known: str, device: torch.device, made: Pieces
) -> tuple[dict[str, Any], Callable[[], None]]:
    """The content of the file, and a function that prints the tables; `known`: the checksum of the weights.

    Raises `InputError` for a set of another model or without sites.
    """
    from sae.activations.cache import ActivationCache
    from sae.activations.files.manifest import read_manifest

    if config.encoder not in ("auto", "product"):
        raise InputError(f"expected the encoder product for a set of dictionaries, which is measured in the model, got {config.encoder}")
    if not config.sequences:
        raise InputError("expected --sequences of at least 1 for a set of dictionaries, which is measured in the model itself, got 0")
    verify = config.verify and made.processes.leads
    cache = ActivationCache.open(config.cache, next(iter(read_manifest(config.cache)["sites"])), verify=verify)
    refuse_training_tokens(Path(config.dictionary), cache)
    layers, dictionaries = list(bundle), list(bundle.values())
    model = cache.manifest["model"]
    dictionaries[0].require_model(model["name"], model["fingerprint"], named=config.model is not None)
    text = held_out_text(config, cache, device)
    require_widths(text.lm, dictionaries)
    comparison = compare(text, dictionaries, config.batch, made)
    found = {site: metrics.result() for site, metrics in comparison.sites.items()}
    means = {site: one.mean_d for site, one in found.items()}
    loss = language_model_loss(
        text.lm, dictionaries, text.sequences, means, replaced=text.replaced, batch=config.batch, seed=config.seed, made=made
    )
    result = {
        "dictionary": str(config.dictionary),
        "weights_crc32": known,
        "model": model,
        "cache": str(config.cache),
        "split": "held_out",
        "seed": config.seed,
        "rows": comparison.rows,
        "layers": {
            str(layer): {
                "reads": [port.site for port in dictionary.reads],
                "writes": [port.site for port in dictionary.writes],
                "d_sae": dictionary.d_sae,
                "l0": int(fired_f.sum()) / comparison.rows,
                "dead": int((fired_f == 0).sum()),
            }
            for layer, dictionary, fired_f in zip(layers, dictionaries, comparison.fired)
        },
        "sites": {site: {name: getattr(one, name) for name in ("fvu", "mse", "cosine", "norm_ratio")} for site, one in found.items()},
        "language_model": loss._asdict(),
    }
    return result, partial(print_tables, config, jsonable(result), loss)


@torch.no_grad()
def compare(text: Text, dictionaries: Sequence[Dictionary], batch: int, made: Pieces) -> Comparison:
    """Compares at the replaced positions of all sequences; the model computes as if nothing were replaced."""
    every = list(batches(text.lm, text.sequences, text.replaced, batch))
    groups = [every[part.start : part.stop] for part in stretches(len(every))]

    def compute(number: int, advance: Callable[[int], None]) -> dict[str, Tensor]:
        own = Comparison.of(dictionaries)
        rows = 0
        for some in groups[number]:
            rows += add_to(own, text, dictionaries, some)
            advance(len(some))
        states = {f"{site}|{name}": sum_ for site, metrics in own.sites.items() for name, sum_ in metrics.state().items()}
        return states | {f"{k}|fired_f": fired_f.cpu() for k, fired_f in enumerate(own.fired)} | {"rows": torch.tensor(rows)}

    rows, total = 0, Comparison.of(dictionaries)
    for found in results(made, "reconstruction", "sequences", [sum(map(len, group)) for group in groups], compute):
        rows += int(found["rows"])
        for site, metrics in total.sites.items():
            metrics.merge_state({name.removeprefix(f"{site}|"): sum_ for name, sum_ in found.items() if name.startswith(f"{site}|")})
        for k, fired_f in enumerate(total.fired):
            fired_f.add_(found[f"{k}|fired_f"].to(fired_f.device))
    return total._replace(rows=rows)


def add_to(own: Comparison, text: Text, dictionaries: Sequence[Dictionary], some: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """Adds one batch of sequences; returns the positions that were compared."""
    ids_sp, mask_sp, replaced_sp = padded(some)
    replaced_n = replaced_sp.flatten()

    def there(site: str, x_spd: Tensor, y_spd: Tensor) -> Tensor:
        x_nd, y_nd = (t_spd[replaced_sp.to(t_spd.device)].to(own.fired[0].device) for t_spd in (x_spd, y_spd))
        own.sites[site].add(x_nd, x_nd[:, :0], y_nd)
        return x_spd

    def count(k: int, positions: slice, acts_nf: Tensor) -> None:
        own.fired[k].add_((acts_nf[replaced_n[positions].to(acts_nf.device)] != 0).sum(0))

    with text.lm.edited(Splice(dictionaries, there, count).edits):
        text.lm.logits(ids_sp.to(text.lm.device), mask_sp.to(text.lm.device))
    return int(replaced_n.sum())


def print_tables(config: EvaluationConfig, result: dict[str, Any], loss: LanguageModelLoss) -> None:
    from rich.console import Console
    from rich.table import Table

    layers = Table("layer", "reads", "writes", "features", "L0", "dead", title=f"{config.dictionary}: {len(result['layers'])} layers")
    for layer, one in result["layers"].items():
        writes = one["writes"][0] + (f" and {len(one['writes']) - 1} more" if len(one["writes"]) > 1 else "")
        layers.add_row(layer, *one["reads"], writes, f"{one['d_sae']:,}", f"{one['l0']:.1f}", f"{one['dead']:,}")
    sites = Table("site", "FVU", "cosine", "norm ratio", title="all layers together, in the clean model")
    for site, one in result["sites"].items():
        sites.add_row(site, *("undefined" if one[key] is None else f"{one[key]:.4f}" for key in ("fvu", "cosine", "norm_ratio")))
    console = Console()
    for table in (layers, sites, loss_table(loss)):
        console.print(table)


def loss_table(loss: LanguageModelLoss) -> "Table":
    from rich.table import Table

    table = Table("arm", "cross-entropy", "KL to clean", title=f"all sites replaced, {loss.tokens:,} tokens of {loss.sequences} sequences")
    for arm, value in loss.cross_entropy.items():
        table.add_row(arm, f"{value:.4f}", f"{loss.kl[arm]:.4f}" if arm in loss.kl else "")
    low, high = loss.loss_recovered_interval
    table.add_row("loss recovered", f"{loss.loss_recovered:.4f} [{low:.4f}, {high:.4f}]", "")
    return table
