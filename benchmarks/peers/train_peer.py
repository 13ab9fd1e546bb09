"""One dictionary by another tool's own trainer, fed with our cache's batches, and saved in our format; runs in .peers.

Every tool minimises ‖x − x̂‖² + l1 · Σ activation · decoder norm; `--l1` is the coefficient for activations of mean squared norm d_in,
and is converted to the tool's own normalisation. Schedules are the tool's recommended ones: the L1 coefficient rises over the first
5 % of the steps, the learning rate falls to zero over the last 20 % (SAELens' training tutorial, dictionary_learning's demo).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.activations.source import Batches
from sae.dictionaries.dictionary import Dictionary

NORM_BATCHES = 50


def saelens(args: argparse.Namespace, batches: Batches, d_in: int) -> Dictionary:
    """`SAETrainer` with `StandardTrainingSAE` and the tutorial's normalisation, folded into the weights by SAELens itself."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(args.seed)
    rows = (batch[args.site] for batch in batches)
    cfg = StandardTrainingSAEConfig(
        d_in=d_in,
        d_sae=args.d_sae,
        device=args.device,
        l1_coefficient=args.l1,
        l1_warm_up_steps=args.steps // 20,
        normalize_activations="expected_average_only_in",
    )
    trainer_cfg = SAETrainerConfig(
        total_training_samples=args.steps * args.batch_size,
        train_batch_size_samples=args.batch_size,
        lr=args.lr,
        lr_end=args.lr,  # of the constant part
        lr_decay_steps=args.steps // 5,
        device=args.device,
    )
    trainer = SAETrainer(trainer_cfg, StandardTrainingSAE(cfg), data_provider=rows)
    # estimated beforehand, as SAELens does it, so that its own estimate does not use up training batches
    norms = [next(rows).norm(dim=-1).mean().item() for _ in range(NORM_BATCHES)]
    batches.seek(0)
    trainer.activation_scaler.scaling_factor = d_in**0.5 / (sum(norms) / len(norms))
    sae = trainer.fit()
    ours = Dictionary.autoencoder(sae.W_enc.data.T.contiguous(), sae.b_enc.data, sae.W_dec.data, sae.b_dec.data)
    check_equal(ours, lambda x_bd: sae.decode(sae.encode(x_bd)), next(rows))
    return ours


def dictionary_learning(args: argparse.Namespace, batches: Batches, d_in: int) -> Dictionary:
    """`StandardTrainerAprilUpdate` on activations of unit mean squared norm, as its `trainSAE` and its demo normalise them."""
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    rows = (batch[args.site] for batch in batches)
    mean_squares = [next(rows).square().sum(-1).mean().item() for _ in range(NORM_BATCHES)]
    batches.seek(0)
    norm = (sum(mean_squares) / len(mean_squares)) ** 0.5
    trainer = StandardTrainerAprilUpdate(
        steps=args.steps,
        activation_dim=d_in,
        dict_size=args.d_sae,
        layer=0,
        lm_name="",
        lr=args.lr,
        l1_penalty=args.l1 / d_in**0.5,  # the squared error shrinks by d_in, the activations by its root
        warmup_steps=min(1000, args.steps // 20),
        sparsity_warmup_steps=args.steps // 20,
        decay_start=args.steps - args.steps // 5,
        seed=args.seed,
        device=args.device,
    )
    for step in range(args.steps):
        trainer.update(step, next(rows) / norm)
    ae, x_bd = trainer.ae, next(rows)
    before_bd = ae(x_bd / norm).detach() * norm
    ae.scale_biases(norm)
    ours = Dictionary.autoencoder(ae.encoder.weight.data, ae.encoder.bias.data, ae.decoder.weight.data.T.contiguous(), ae.bias.data)
    check_equal(ours, lambda _: before_bd, x_bd)
    return ours


@torch.no_grad()
def check_equal(ours: Dictionary, theirs: Callable[[Tensor], Tensor], x_bd: Tensor) -> None:
    """The converted dictionary must reconstruct raw activations as the tool does."""
    expected_bd = theirs(x_bd)
    torch.testing.assert_close(ours(x_bd), expected_bd, rtol=1e-3, atol=1e-4 * float(expected_bd.abs().max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=["saelens", "dictionary_learning"], required=True)
    for name, kind in dict(cache=Path, site=str, out=Path, device=str, l1=float, lr=float).items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name in ("steps", "batch-size", "d-sae", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    cache = ActivationCache.open(args.cache, args.site)
    batches = CachedSource(cache).batches(args.batch_size, seed=args.seed, device=args.device)
    train = {"saelens": saelens, "dictionary_learning": dictionary_learning}[args.peer]
    start = time.monotonic()
    dictionary = train(args, batches, cache.d_in)
    assert batches.position == args.steps + 1, "a peer must be trained on the same batches as we are; one more is for the check"
    dictionary.metadata = {"site": cache.site, "trained_by": args.peer}
    dictionary.save(args.out)
    (args.out / "seconds.json").write_text(json.dumps(time.monotonic() - start))


if __name__ == "__main__":
    main()
