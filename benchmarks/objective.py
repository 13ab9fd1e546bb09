"""Time of a whole training step, Adam included, as multiples of the encoder product alone, side by side in one process.

Rounds are interleaved, so that a slow spell of the machine hits every arm alike; what is printed are medians and ranges of ratios within
a round. Eager is the formula through autograd with torch's fused Adam, the L1 term written as a matrix-vector product.

b rows (tokens) · d model width · f features
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sae.command_line import run
from sae.dictionary import SparseAutoencoder
from sae.objective import Weights, Workspace, objective


@dataclass
class BenchmarkConfig:
    d_in: int = 512
    d_sae: tuple[int, ...] = (4096, 16384)
    batch_size: int = 4096
    l0: float = 64.0
    """features active in a row, on average"""
    rounds: int = 5
    """interleaved rounds after one that is not counted"""
    threads: int = 2
    seed: int = 0


def benchmark(config: BenchmarkConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(config.threads)
    title = f"d_in {config.d_in}, batch {config.batch_size}, L0 {config.l0:g}, {config.threads} threads, torch {torch.__version__}"
    table = Table("d_sae", "arm", "ms", "x encoder product", "eager / this", title=title)
    for d_sae in config.d_sae:
        arms = make_arms(config, d_sae)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for round_number in range(config.rounds + 1):
            for name, arm in arms.items():
                began = time.perf_counter()
                arm()
                if round_number:
                    seconds[name].append(time.perf_counter() - began)
        for name, times in seconds.items():
            multiples = [t / e for t, e in zip(times, seconds["encoder product"])]
            gains = [e / t for t, e in zip(times, seconds["eager"])]
            table.add_row(f"{d_sae:,}", name, f"{1000 * statistics.median(times):.0f}", spread(multiples), spread(gains))
    Console().print(table)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def make_arms(config: BenchmarkConfig, d_sae: int) -> dict[str, Callable[[], None]]:
    """The same batch and weights for every arm; the bias is set so that `l0` features fire on average."""
    torch.manual_seed(config.seed)
    x_bd = torch.randn(config.batch_size, config.d_in)
    sae = SparseAutoencoder.initial(config.d_in, d_sae, seed=config.seed, decoder_norm=1.0)
    z_bf = x_bd[:256] @ sae.W_enc_fd.detach().T
    with torch.no_grad():
        sae.b_enc_f.fill_(-float(z_bf.flatten().kthvalue(int(z_bf.numel() * (1 - config.l0 / d_sae))).values))
    lr = 0.0  # the work of a step without its effect, so that every round has the same sparsity
    ours = [p.detach().clone().requires_grad_() for p in sae.parameters()]
    ours_adam, eager_adam = torch.optim.Adam(ours, lr=lr, fused=True), torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    workspace = Workspace()
    out_bf = torch.empty(config.batch_size, d_sae)

    def encoder_product() -> None:
        with torch.no_grad():
            torch.addmm(sae.b_enc_f, x_bd, sae.W_enc_fd.T, out=out_bf)

    def our_step() -> None:
        step = objective(x_bd, Weights(*ours), 1.0, "auto", workspace)
        for parameter, gradient in zip(ours, step.gradients):
            parameter.grad = gradient
        ours_adam.step()

    def eager() -> None:
        acts_bf = torch.relu((x_bd - sae.b_dec_d) @ sae.W_enc_fd.T + sae.b_enc_f)
        x_hat_bd = acts_bf @ sae.W_dec_fd + sae.b_dec_d
        loss = (x_hat_bd - x_bd).square().sum(-1).mean() + (acts_bf @ sae.W_dec_fd.norm(dim=-1)).mean()
        eager_adam.zero_grad()
        loss.backward()
        eager_adam.step()

    return {"encoder product": encoder_product, "ours": our_step, "eager": eager}


if __name__ == "__main__":
    run(benchmark, BenchmarkConfig, __doc__ or "")
