"""One arm of kinds.py in its own process: a whole training step of one kind by one tool, done whenever its standard input says so.

As arms.py, in ours or the peers' environment, with learning rate 0. The auxiliary loss for dead features is not part of a step: none is
dead in so few. L0 is that of the problem's bias, or k.
"""

import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import torch
from answers import Answer, answering
from arms import Arm, Problem, copy, encoder_product, forget_peak, held_now, load, memory, set_products, sparsify, timed, with_moments

STEPS = 1_000_000  # never reached
WARM_UP = 2
CHOOSING = "topk", "abstopk", "batchtopk", "matryoshka"


def ours(p: Problem, kind: str, k: int) -> Arm:
    """What a step of `sae train` does, clipping included; p-annealing at its last power."""
    from sae.encoding import fastest
    from sae.kinds import KINDS, Now
    from sae.objective import Adam, Weights, Workspace, objective, screens

    d, d_sae = p.x_bd.shape[1], len(p.b_enc_f)
    options = {"l1": {"l1": (p.l1,)}, "k": {"k": (k,)}, "target_l0": {"target_l0": (float(k),)}}
    swept = "target_l0" if kind == "jumprelu" else "k" if kind in CHOOSING else "l1"
    prefixes = {"prefixes": (d_sae // 16, d_sae // 4, d_sae)} if kind == "matryoshka" else {}
    made: Any = KINDS[kind](**options[swept], **prefixes)
    own = {name: torch.nn.Parameter(tensor) for name, tensor in made.own(d, d_sae).items()}
    if kind == "gated":
        copy((own["b_mag_f"], p.b_enc_f))
    weights = Weights(*p.parameters())
    optimizer = Adam([*weights, *own.values()], lr=0.0)
    now = Now(STEPS - 1, STEPS, d, torch.zeros(d_sae, dtype=torch.bool), made.state())
    rule = made.goal(made.values[0], now).rule(weights, own)
    of_rows = k if rule is not None and rule.top and rule.over == "row" else 0
    method = fastest(p.x_bd - p.b_dec_d, p.W_enc_fd, p.b_enc_f, k=of_rows) if screens(rule) else "product"
    workspace = Workspace(p.precision, p.deterministic, encoder=method)

    @torch.no_grad()
    def step() -> Any:
        goal = made.goal(made.values[0], now)
        result = objective(p.x_bd, weights, goal, p.backend, workspace, optimizer, 1.0, own=own, unit_rows=made.unit_rows)
        made.after(result, own, now)
        return result

    return Arm(step, lambda: {"l0": float(step().l0), "encoder": method})


def saelens(p: Problem, kind: str, k: int) -> Arm:
    """`SAETrainer.step`: forward, firing counts, backward, clipping, Adam, schedules."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    d_sae = len(p.b_enc_f)
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "relu": ("standard", dict(l1_coefficient=p.l1)),
        "gated": ("gated", dict(l1_coefficient=p.l1)),
        "topk": ("topk", dict(k=k)),
        "abstopk": ("abstopk", dict(k=k)),
        "batchtopk": ("batchtopk", dict(k=k)),
        "matryoshka": ("matryoshka_batchtopk", dict(k=k, matryoshka_widths=[d_sae // 16, d_sae // 4, d_sae])),
        "jumprelu": ("jumprelu", dict(jumprelu_sparsity_loss_mode="quadratic", target_l0=float(k), jumprelu_init_threshold=1e-3)),
    }
    architecture, options = own[kind]
    sae_class, cfg_class = get_sae_training_class(architecture)
    sae = sae_class(cfg_class(d_in=p.x_bd.shape[1], d_sae=d_sae, device="cpu", **options))
    biases = (sae.b_gate, sae.b_mag) if kind == "gated" else (sae.b_enc,)
    copy((sae.W_enc, p.W_enc_fd.T), (sae.W_dec, p.W_dec_fd), (sae.b_dec, p.b_dec_d), *((bias, p.b_enc_f) for bias in biases))
    rows = len(p.x_bd)
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * rows, train_batch_size_samples=rows, lr=0.0, lr_end=0.0, feature_sampling_window=STEPS
    )
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))
    with_moments(trainer.optimizer)

    def step() -> None:
        trainer.step(p.x_bd)
        trainer.n_training_steps += 1

    def check() -> dict[str, Any]:
        return {"l0": l0_of(sae.encode_with_hidden_pre(p.x_bd)[0]), "version": importlib.metadata.version("sae-lens")}

    return Arm(step, check)


def dictionary_learning(p: Problem, kind: str, k: int) -> Arm:
    """Its trainers' `update`: forward, backward, clipping where it has it, Adam, schedule, decoder rows back to length 1."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    # p-annealing after its first update of p: from then on it computes a second norm each step
    annealing = dict(sparsity_function="Lp^p", p_end=0.2, anneal_start=1, anneal_end=STEPS - 1)
    own: dict[str, tuple[type, dict[str, Any]]] = {
        "relu": (StandardTrainerAprilUpdate, dict(l1_penalty=p.l1, sparsity_warmup_steps=None)),
        "p-annealing": (trainers.PAnnealTrainer, dict(initial_sparsity_penalty=p.l1, sparsity_warmup_steps=None, **annealing)),
        "gated": (trainers.GatedSAETrainer, dict(l1_penalty=p.l1, sparsity_warmup_steps=None)),
        "topk": (trainers.TopKTrainer, dict(k=k)),
        "batchtopk": (BatchTopKTrainer, dict(k=k)),
        "matryoshka": (MatryoshkaBatchTopKTrainer, dict(k=k, group_fractions=[1 / 16, 3 / 16, 3 / 4])),
        "jumprelu": (trainers.JumpReluTrainer, dict(target_l0=float(k), sparsity_warmup_steps=None)),
    }
    trainer_class, options = own[kind]
    d_in, d_sae = p.x_bd.shape[1], len(p.b_enc_f)
    common = dict(steps=STEPS, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="", lr=0.0, warmup_steps=0, device="cpu")
    trainer = trainer_class(**common, **options)
    ae = trainer.ae
    if kind in ("jumprelu", "matryoshka"):
        copy((ae.W_enc, p.W_enc_fd.T), (ae.W_dec, p.W_dec_fd), (ae.b_dec, p.b_dec_d), (ae.b_enc, p.b_enc_f))
    else:
        bias = {"relu": "bias", "p-annealing": "bias", "gated": "decoder_bias"}.get(kind, "b_dec")
        biases = (ae.gate_bias, ae.mag_bias) if kind == "gated" else (ae.encoder.bias,)
        pairs = [(ae.encoder.weight, p.W_enc_fd), (ae.decoder.weight, p.W_dec_fd.T), (getattr(ae, bias), p.b_dec_d)]
        copy(*pairs, *((one, p.b_enc_f) for one in biases))
    if kind == "jumprelu":  # it does not subtract b_dec
        with torch.no_grad():
            ae.b_enc -= p.W_enc_fd @ p.b_dec_d
    with_moments(trainer.optimizer)

    def check() -> dict[str, Any]:
        top = {"use_threshold": False} if kind in ("batchtopk", "matryoshka") else {}
        return {"l0": l0_of(ae.encode(p.x_bd, **top)), "version": importlib.metadata.version("dictionary-learning")}

    return Arm(lambda: trainer.update(1, p.x_bd), check)


def l0_of(acts_bf: torch.Tensor) -> float:
    acts_bf = acts_bf.to_dense() if acts_bf.is_sparse else acts_bf
    return float((acts_bf != 0).sum() / len(acts_bf))


ARMS: dict[str, Callable[[Problem, str, int], Arm]] = {
    "encoder": lambda p, kind, k: encoder_product(p),
    "ours": ours,
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": lambda p, kind, k: sparsify(p, k),
}


def serve(settings: dict[str, Any], answer: Answer) -> None:
    torch.set_num_threads(settings["threads"])
    problem = load(settings)
    set_products(problem)
    if settings["kind"] in CHOOSING and settings["synthetic"]:
        problem.b_enc_f.zero_()  # so that every row has k above 0
    arm = ARMS[settings["tool"]](problem, settings["kind"], settings["k"])
    held = held_now("cpu")
    for _ in range(WARM_UP):
        arm.step()
    forget_peak("cpu")
    answer(ready=True)
    for line in sys.stdin:
        if line.strip() == "step":
            answer(seconds=timed(arm.step, "cpu"))
        else:
            _, peak = memory("cpu")
            answer(held=held, peak=peak, **arm.check())


if __name__ == "__main__":
    answering(serve)
