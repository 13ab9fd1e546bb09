"""Dictionaries of every kind by other tools' own trainers, fed with our cache's batches and saved by them; runs in .peers.

The one argument is JSON: `cache`, `site` and `points`, each with `tool`, `kind`, `sparsity`, `lr` (null: the tool's own default), `seed`,
`d_sae`, `steps`, `batch_size`, `dead_steps` and `folder`. A point whose folder holds seconds.json is left as it is.

`sparsity` is k for the TopK kinds, the target L0 for JumpReLU, and otherwise the L1 coefficient for activations of mean squared norm d_in,
converted to the tool's own normalisation. Schedules are shares of the run: sparsity rises over the first 5 % of the steps and the learning
rate falls to zero over the last 20 % (SAELens' training tutorial, dictionary_learning's demo). All else is the tool's default.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.dictionaries.dictionary import Dictionary
from sae.disk.writing import write_json

NORM_BATCHES = 50
GROUPS = 16, 4, 1
"""Matryoshka prefixes, as divisors of d_sae"""


class Point(NamedTuple):
    tool: str
    kind: str
    sparsity: float
    lr: float | None
    seed: int
    d_sae: int
    steps: int
    batch_size: int
    dead_steps: int
    folder: Path

    @property
    def warmup(self) -> int:
        return self.steps // 20

    @property
    def decay(self) -> int:
        return self.steps // 5


class Trained(NamedTuple):
    seconds: float
    """of the tool's training loop, batches included"""
    lr: float
    out_bd: Tensor
    """its reconstruction of the batch after the last"""


def saelens(p: Point, rows: Iterator[Tensor], norms: dict[str, float], last_bd: Tensor) -> Trained:
    """`SAETrainer.fit`, with the tutorial's normalisation, which it folds into the weights; saved for inference."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAE
    from sae_lens.training.sae_trainer import SAETrainer

    d_in, k = last_bd.shape[1], int(p.sparsity)
    l1 = dict(l1_coefficient=p.sparsity, l1_warm_up_steps=p.warmup)
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "relu": ("standard", l1),
        "gated": ("gated", l1),
        "topk": ("topk", dict(k=k)),
        "abstopk": ("abstopk", dict(k=k)),
        "batchtopk": ("batchtopk", dict(k=k)),
        "matryoshka": ("matryoshka_batchtopk", dict(k=k, matryoshka_widths=[p.d_sae // divisor for divisor in GROUPS])),
        "jumprelu": ("jumprelu", dict(jumprelu_sparsity_loss_mode="quadratic", target_l0=p.sparsity, l0_warm_up_steps=p.warmup)),
    }
    architecture, own = options[p.kind]
    sae_class, cfg_class = get_sae_training_class(architecture)
    torch.manual_seed(p.seed)
    sae = sae_class(cfg_class(d_in=d_in, d_sae=p.d_sae, device="cpu", normalize_activations="expected_average_only_in", **own))
    rate = {} if p.lr is None else {"lr": p.lr}
    cfg = SAETrainerConfig(
        total_training_samples=p.steps * p.batch_size,
        train_batch_size_samples=p.batch_size,
        lr_decay_steps=p.decay,
        dead_feature_window=p.dead_steps,
        device="cpu",
        **rate,
    )
    cfg.lr_end = cfg.lr  # of the constant part
    trainer = SAETrainer(cfg, sae, data_provider=rows)
    # estimated beforehand, as SAELens does it, so that its own estimate does not use up training batches
    trainer.activation_scaler.scaling_factor = d_in**0.5 / norms["mean"]
    start = time.monotonic()
    trainer.fit()
    seconds = time.monotonic() - start
    sae.save_inference_model(p.folder)
    read = SAE.load_from_disk(str(p.folder))
    return Trained(seconds, cfg.lr, read.decode(read.encode(last_bd)))


def dictionary_learning(p: Point, rows: Iterator[Tensor], norms: dict[str, float], last_bd: Tensor) -> Trained:
    """Its trainers on activations of unit mean squared norm, and its files, as its `trainSAE` does it."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    d_in = last_bd.shape[1]
    l1 = p.sparsity / d_in**0.5  # the squared error shrinks by d_in, the activations by its root
    warm = dict(sparsity_warmup_steps=p.warmup)
    top = dict(k=int(p.sparsity), threshold_start_step=min(1000, p.steps // 2))
    ends = [1 / divisor for divisor in GROUPS]
    fractions = [end - begin for begin, end in zip([0.0, *ends], ends)]
    # annealed as in the paper's runs (Karvonen et al. 2024): Lp^p, p from 1 to 0.2
    annealing = dict(initial_sparsity_penalty=l1, sparsity_function="Lp^p", p_end=0.2, anneal_start=p.warmup)
    options: dict[str, tuple[type, dict[str, Any]]] = {
        "relu": (StandardTrainerAprilUpdate, dict(l1_penalty=l1, **warm)),
        "p-annealing": (trainers.PAnnealTrainer, dict(**annealing, **warm)),
        "gated": (trainers.GatedSAETrainer, dict(l1_penalty=l1, **warm)),
        "topk": (trainers.TopKTrainer, top),
        "batchtopk": (BatchTopKTrainer, top),
        "matryoshka": (MatryoshkaBatchTopKTrainer, dict(group_fractions=fractions, **top)),
        "jumprelu": (trainers.JumpReluTrainer, dict(target_l0=p.sparsity, **warm)),
    }
    trainer_class, own = options[p.kind]
    common = dict(steps=p.steps, activation_dim=d_in, dict_size=p.d_sae, layer=0, lm_name="", seed=p.seed, device="cpu")
    rate = {} if p.lr is None else {"lr": p.lr}
    torch.manual_seed(p.seed)  # JumpReluTrainer does not use its seed
    trainer = trainer_class(**common, **own, **rate, warmup_steps=p.warmup, decay_start=p.steps - p.decay)
    if hasattr(trainer, "auxk_alpha"):
        trainer.dead_feature_threshold = p.dead_steps * p.batch_size
    norm = norms["mean_square"] ** 0.5
    start = time.monotonic()
    for step in range(p.steps):
        trainer.update(step, next(rows) / norm)
    seconds = time.monotonic() - start
    ae = trainer.ae
    ae.scale_biases(norm)
    p.folder.mkdir(parents=True, exist_ok=True)
    torch.save(ae.state_dict(), p.folder / "ae.pt")
    config = {name: value for name, value in trainer.config.items() if isinstance(value, (int, float, str, list)) or value is None}
    write_json(p.folder / "config.json", {"trainer": config})
    if hasattr(ae, "normalize_decoder"):
        ae.normalize_decoder()  # as its loader does
    return Trained(seconds, trainer.lr, ae(last_bd))


TOOLS = {"saelens": saelens, "dictionary_learning": dictionary_learning}


@torch.no_grad()
def check_equal(folder: Path, expected_bd: Tensor, x_bd: Tensor) -> None:
    """Our reader's dictionary must reconstruct raw activations as the tool does; but for one row in a hundred, where a gated feature may be
    within rounding of its gate, and then it is on in one and off in the other."""
    ours_bd = Dictionary.load(folder)(x_bd)
    equal_b = ours_bd.isclose(expected_bd, rtol=1e-3, atol=1e-4 * float(expected_bd.abs().max())).all(1)
    if float(equal_b.double().mean()) < 0.99:
        torch.testing.assert_close(ours_bd, expected_bd, rtol=1e-3, atol=1e-4 * float(expected_bd.abs().max()))


def train(p: Point, source: CachedSource, site: str) -> None:
    batches = source.batches(p.batch_size, seed=p.seed)
    rows = (batch[site] for batch in batches)
    first = [next(rows) for _ in range(NORM_BATCHES)]
    norms = {
        "mean": sum(x_bd.norm(dim=-1).mean().item() for x_bd in first) / NORM_BATCHES,
        "mean_square": sum(x_bd.square().sum(-1).mean().item() for x_bd in first) / NORM_BATCHES,
    }
    last_bd = first[-1].clone()
    batches.seek(0)
    trained = TOOLS[p.tool](p, rows, norms, last_bd)
    assert batches.position == p.steps, "a peer must be trained on the same batches as we are"
    check_equal(p.folder, trained.out_bd.detach(), last_bd)
    write_json(p.folder / "seconds.json", {"seconds": trained.seconds, "lr": trained.lr})


def main() -> None:
    settings = json.loads(sys.argv[1])
    source = CachedSource(ActivationCache.open(Path(settings["cache"]), settings["site"]))
    for values in settings["points"]:
        p = Point(**{**values, "folder": Path(values["folder"])})
        if not (p.folder / "seconds.json").exists():
            print(f"{p.tool} {p.kind}, {p.sparsity:g}, learning rate {p.lr or 'its own'}, seed {p.seed}", flush=True)
            train(p, source, settings["site"])


if __name__ == "__main__":
    main()
