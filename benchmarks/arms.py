"""One arm of objective.py in its own process: it builds a training step, then does one whenever its standard input says so.

Runs in this project's environment or in the peers' one. It answers in lines of JSON on its standard output: {"ready"}, {"seconds"} for
each line "step", the peak memory and numbers to compare for "finish", {"error"} if it fails. All steps have learning rate 0: the
work of a step without its effect, so that every step has the same sparsity. Adam's moments exist from the start. With precision bfloat16
the rivals run under autocast, our step with bfloat16 operands. Needs Linux (memory from /proc, glibc).

b rows (tokens) · d model width · f features
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from answers import Answer, answering
from safetensors.torch import load_file
from torch import Tensor

WARM_UP = {"cpu": 1, "cuda": 40}  # on CUDA our step looks at the density every 32 steps
CUDA_STEPS = 10
OUT_BYTES = {"cpu": 1 << 30, "cuda": 1 << 33}
NAMES = ("W_enc_fd", "b_enc_f", "W_dec_fd", "b_dec_d")


class Problem(NamedTuple):
    x_bd: Tensor
    W_enc_fd: Tensor
    b_enc_f: Tensor
    W_dec_fd: Tensor
    b_dec_d: Tensor
    l1: float
    device: str
    backend: Any
    precision: Any
    """float32, tf32 or bfloat16"""
    deterministic: bool = True
    """of our step"""
    clip: float = 0.0
    """largest norm of our step's gradient; the others have settings of their own"""
    encoder: Any = "product"
    """how our step finds active entries; "auto": what is measured to be the fastest"""

    def parameters(self) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(getattr(self, name)) for name in NAMES]


class Arm(NamedTuple):
    step: Callable[[], Any]
    check: Callable[[], dict[str, Any]]
    """numbers that tell whether all arms did the same work; called after all that is measured"""


def encoder_product(p: Problem) -> Arm:
    """The unit of the benchmark: a matrix product with bias into a buffer that stays, by row chunks where that would be very large."""
    dtype = torch.bfloat16 if p.precision == "bfloat16" else torch.float32
    set_products(p)
    centred_bd, W_df, b_enc_f = (p.x_bd - p.b_dec_d).to(dtype), p.W_enc_fd.to(dtype).T, p.b_enc_f.to(dtype)
    rows = max(1, OUT_BYTES[p.device] // (len(b_enc_f) * dtype.itemsize))
    out_bf = torch.empty(min(rows, len(centred_bd)), len(b_enc_f), dtype=dtype, device=p.device)

    def step() -> None:
        for chunk_bd in centred_bd.split(rows):
            torch.addmm(b_enc_f, chunk_bd, W_df, out=out_bf[: len(chunk_bd)])

    def check() -> dict[str, Any]:
        active = 0
        for chunk_bd in centred_bd.split(rows):
            active += int((torch.addmm(b_enc_f, chunk_bd, W_df, out=out_bf[: len(chunk_bd)]) > 0).sum())  # host sync
        return {"l0": active / len(centred_bd)}

    return Arm(torch.no_grad()(step), torch.no_grad()(check))


def ours(p: Problem) -> Arm:
    from sae.encoding import fastest
    from sae.objective import Adam, Weights, Workspace, objective

    weights = Weights(*p.parameters())
    optimizer = Adam(weights, lr=0.0)
    method = fastest(p.x_bd - p.b_dec_d, p.W_enc_fd, p.b_enc_f, 0.0) if p.encoder == "auto" else p.encoder
    workspace = Workspace(p.precision, p.deterministic, encoder=method)

    def step() -> Any:
        return objective(p.x_bd, weights, p.l1, p.backend, workspace, optimizer, p.clip)

    def check() -> dict[str, Any]:
        result = step()
        return {"loss": float(result.loss), "sparse_share": float(result.sparse_share), "encoder": method}  # host sync

    return Arm(step, check)


def dense_loss(x_bd: Tensor, W_enc_fd: Tensor, b_enc_f: Tensor, W_dec_fd: Tensor, b_dec_d: Tensor, l1: float) -> Tensor:
    """The formula as one writes it for speed in plain torch: bias inside the product, the L1 term as a matrix-vector product."""
    acts_bf = torch.relu(torch.nn.functional.linear(x_bd - b_dec_d, W_enc_fd, b_enc_f))
    x_hat_bd = acts_bf @ W_dec_fd + b_dec_d
    return (x_hat_bd - x_bd).square().sum(-1).mean() + l1 * (acts_bf @ W_dec_fd.norm(dim=-1)).mean()


def eager(p: Problem, loss_of: Callable[..., Tensor] = dense_loss) -> Arm:
    """Autograd and torch's fused Adam."""
    parameters = p.parameters()
    optimizer = adam(parameters)
    set_products(p)

    def loss() -> Tensor:
        with autocast(p):
            return loss_of(p.x_bd, *parameters, p.l1)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return Arm(step, lambda: {"loss": float(loss().detach())})  # host sync


def compiled(p: Problem) -> Arm:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")):
        raise RuntimeError("torch.compile needs a C++ compiler and none is installed")
    arm = eager(p, torch.compile(dense_loss, dynamic=False))
    arm.step()  # compiles, so that the compiler's own memory is not taken for the step's
    return arm


def saelens(p: Problem) -> Arm:
    """Its `SAETrainer.step` on its `StandardTrainingSAE`: forward, firing counts, backward, clipping, Adam, schedules."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x_bd, d_sae = p.x_bd, len(p.b_enc_f)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=x_bd.shape[1], d_sae=d_sae, device=p.device, l1_coefficient=p.l1))
    copy((sae.W_enc, p.W_enc_fd.T), (sae.b_enc, p.b_enc_f), (sae.W_dec, p.W_dec_fd), (sae.b_dec, p.b_dec_d))
    steps = 1_000_000  # never reached
    cfg = SAETrainerConfig(
        total_training_samples=steps * len(x_bd),
        train_batch_size_samples=len(x_bd),
        lr=0.0,
        lr_end=0.0,
        device=p.device,
        autocast=p.precision == "bfloat16",
        feature_sampling_window=steps,
    )
    set_products(p)
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))
    with_moments(trainer.optimizer)

    def step() -> Tensor:
        output = trainer.step(x_bd)
        trainer.n_training_steps += 1
        return output.loss

    return Arm(step, lambda: {"loss": float(step()), "version": importlib.metadata.version("sae-lens")})  # host sync


def dictionary_learning(p: Problem) -> Arm:
    """`StandardTrainerAprilUpdate.update`: the trainer of the same objective; forward, backward, clipping, Adam, schedule."""
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    set_products(p)
    x_bd = p.x_bd
    trainer = StandardTrainerAprilUpdate(
        steps=1_000_000,  # never reached
        activation_dim=x_bd.shape[1],
        dict_size=len(p.b_enc_f),
        layer=0,
        lm_name="",
        lr=0.0,
        l1_penalty=p.l1,
        warmup_steps=0,
        sparsity_warmup_steps=None,
        device=p.device,
    )
    ae = trainer.ae
    copy((ae.encoder.weight, p.W_enc_fd), (ae.encoder.bias, p.b_enc_f), (ae.decoder.weight, p.W_dec_fd.T), (ae.bias, p.b_dec_d))
    with_moments(trainer.optimizer)

    def step() -> None:
        with autocast(p):  # as its `trainSAE` does
            trainer.update(1, x_bd)

    def check() -> dict[str, Any]:
        with autocast(p):
            loss = float(trainer.loss(x_bd, step=1).detach())  # host sync
        return {"loss": loss, "version": importlib.metadata.version("dictionary-learning")}

    return Arm(step, check)


def sparsify(p: Problem, k: int = 32) -> Arm:
    """What its `Trainer.fit` does to one batch; not the same objective. torch's fused Adam stands in for its own optimisers."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.set_float32_matmul_precision("high")  # as its trainer does
    x_bd = p.x_bd
    sae = SparseCoder(x_bd.shape[1], SparseCoderConfig(num_latents=len(p.b_enc_f), k=min(k, len(p.b_enc_f))), p.device, torch.float32)
    copy((sae.encoder.weight, p.W_enc_fd), (sae.encoder.bias, p.b_enc_f), (sae.W_dec, p.W_dec_fd), (sae.b_dec, p.b_dec_d))
    optimizer = adam(sae.parameters())
    fired_f = torch.zeros(sae.num_latents, dtype=torch.bool, device=p.device)

    def step() -> float:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x_bd - x_bd.mean(0)).pow(2).sum()
        out = sae(x=x_bd, y=x_bd, total_variance=total_variance)
        fired_f[out.latent_indices.flatten()] = True
        fvu = float(out.fvu.detach())  # host sync, as its trainer does
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        return fvu

    return Arm(step, lambda: {"fvu": step(), "version": importlib.metadata.version("eai-sparsify")})


ARMS: dict[str, Callable[[Problem], Arm]] = dict(
    encoder=encoder_product,
    ours=ours,
    eager=eager,
    eager_tuned=eager,
    compile=compiled,
    saelens=saelens,
    dictionary_learning=dictionary_learning,
    sparsify=sparsify,
    sparsify_plain=sparsify,
)
PEERS = ("saelens", "dictionary_learning", "sparsify", "sparsify_plain")
"""in the peers' environment"""
SYSTEM_ALLOCATOR = ("encoder", "ours", "eager", "sparsify_plain")
"""all others run with a tuned one"""
LABELS = {
    "encoder": "encoder product alone",
    "ours": "ours",
    "eager": "eager, default allocator",
    "eager_tuned": "eager",
    "compile": "torch.compile",
    "saelens": "SAELens standard",
    "dictionary_learning": "dictionary_learning April",
    "sparsify": "sparsify TopK, k 32",
    "sparsify_plain": "sparsify TopK, k 32, default allocator",
}


def adam(parameters: Any) -> torch.optim.Adam:
    return with_moments(torch.optim.Adam(list(parameters), lr=0.0, fused=True))


def with_moments(optimizer: torch.optim.Adam) -> torch.optim.Adam:
    """The state that Adam's first step would create, so that it counts as held and not as the step's own memory."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            optimizer.state[parameter] = {"step": step} | {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return optimizer


@torch.no_grad()
def copy(*pairs: tuple[Tensor, Tensor]) -> None:
    """The given values in the tool's own parameters, whose layout in memory stays its own."""
    for target, source in pairs:
        target.copy_(source)


def set_products(p: Problem) -> None:
    """Of torch's own products in float32, for the whole process."""
    torch.set_float32_matmul_precision("high" if p.precision == "tf32" else "highest")


def autocast(p: Problem) -> contextlib.AbstractContextManager:
    return torch.autocast(p.device, torch.bfloat16) if p.precision == "bfloat16" else contextlib.nullcontext()


def timed(step: Callable[[], Any], device: str) -> float:
    """Seconds of a step; on CUDA the mean of several by the device's clock, after two that wake the device and refill the allocator."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    for _ in range(2):
        step()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(CUDA_STEPS):
        step()
    ended.record()
    ended.synchronize()  # host sync
    torch.cuda.empty_cache()  # room for the other arms' processes
    return began.elapsed_time(ended) / 1000 / CUDA_STEPS


def memory(device: str) -> tuple[int, int]:
    """Bytes held now, and at most since `forget_peak`: of the process, or on CUDA of its tensors there."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back, see proc(5)


def held_now(device: str) -> int:
    """Bytes held once all that building the arm has freed is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory(device)[0]


def load(settings: dict[str, Any]) -> Problem:
    tensors = load_file(settings["problem"])  # mapped from the file: cloned, so that it lies in memory as it would in training
    own = {name: tensors[name].clone().to(settings["device"]) for name in ("x_bd", *NAMES)}
    precision = "bfloat16" if settings["device"] == "cuda" else "float32"
    ours = {name: settings[name] for name in ("backend", "encoder") if name in settings}  # the benchmark of other kinds keeps the product
    return Problem(**own, l1=settings["l1"], device=settings["device"], precision=precision, **ours)


def serve(settings: dict[str, Any], answer: Answer) -> None:
    torch.set_num_threads(settings["threads"])
    device = settings["device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"the torch {torch.__version__} of its environment finds no CUDA GPU")
    arm = ARMS[settings["arm"]](load(settings))
    held = held_now(device)
    for _ in range(WARM_UP[device]):
        arm.step()
    forget_peak(device)
    answer(ready=True)
    for line in sys.stdin:
        if line.strip() == "step":
            answer(seconds=timed(arm.step, device))
        else:
            _, peak = memory(device)
            answer(held=held, peak=peak, **arm.check())


if __name__ == "__main__":
    answering(serve)
