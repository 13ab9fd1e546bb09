"""One dictionary under training: its weights, optimiser and firing counts; a step, and the resampling of dead features.

b rows (tokens) · d model width · f features; everything in training units (mean squared norm of the activations = d)
"""

import torch
from torch import Tensor

from sae.dictionary import SparseAutoencoder
from sae.objective import Step, Weights, Workspace, objective
from sae.training.config import TrainingConfig, l1_now, learning_rate

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Run:
    """A dictionary of a sweep. `state` and `restore` carry all that the next step and the next line of metrics depend on."""

    def __init__(self, l1: float, dictionary: SparseAutoencoder, config: TrainingConfig):
        self.l1, self.config, self.dictionary = l1, config, dictionary
        self.weights = Weights(*(getattr(dictionary, name) for name in Weights._fields))
        device = dictionary.W_dec_fd.device
        self.adam = torch.optim.Adam(self.weights, lr=config.lr, betas=config.betas, fused=True)
        for parameter in self.weights:  # moments exist from the start, so that a checkpoint always has them
            self.adam.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.workspace = Workspace()
        self.silent_steps_f = torch.zeros(dictionary.d_sae, dtype=torch.int64, device=device)
        self.fired_f = torch.zeros(dictionary.d_sae, dtype=torch.int64, device=device)
        self.rows_counted = torch.zeros((), dtype=torch.int64)
        self.sparse_rows = torch.zeros((), dtype=torch.float64)
        self.resampled = torch.zeros((), dtype=torch.int64)

    def gradients(self, x_bd: Tensor, step: int) -> Step:
        return objective(x_bd, self.weights, l1_now(step, self.l1, self.config), self.config.backend, self.workspace)

    @torch.no_grad()
    def update(self, result: Step, rows: int, step: int) -> None:
        """Applies the gradients of `result` and counts which features fired."""
        for parameter, gradient in zip(self.weights, result.gradients):
            parameter.grad = gradient
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.weights, self.config.clip)
        self.adam.param_groups[0]["lr"] = learning_rate(step, self.config)
        self.adam.step()
        self.silent_steps_f = torch.where(result.fired_f > 0, 0, self.silent_steps_f + 1)
        self.fired_f += result.fired_f
        self.rows_counted += rows
        self.sparse_rows += result.sparse_share * rows

    def dead_f(self) -> Tensor:
        """Which features have not fired for `dead_steps` steps, [f] bool."""
        return self.silent_steps_f >= self.config.dead_steps

    @torch.no_grad()
    def resample(self, x_bd: Tensor, step: int) -> int:
        """Points dead features at what the dictionary reconstructs worst; gives their number.

        As in Towards Monosemanticity (2023): rows of the batch are drawn with probability proportional to their squared loss, the
        encoder row gets 0.2 of the mean norm of living ones, the bias 0, Adam's moments 0. The new direction is the row's residual
        rather than the row itself, since what is already explained needs no second feature.
        """
        dead_f = self.dead_f()
        count = int(dead_f.sum())  # host sync
        if not count or count == len(dead_f):
            return 0  # without a living feature there is no scale to follow
        residual_bd = x_bd - self.dictionary(x_bd)
        loss_b = residual_bd.square().sum(-1)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        drawn = torch.multinomial(loss_b.double().square().cpu(), count, replacement=count > len(x_bd), generator=generator)  # host sync
        direction = torch.nn.functional.normalize(residual_bd[drawn.to(x_bd.device)], dim=-1)
        W_enc_fd, b_enc_f, W_dec_fd, _ = self.weights
        W_enc_fd[dead_f] = direction * 0.2 * W_enc_fd[~dead_f].norm(dim=-1).mean()
        W_dec_fd[dead_f] = direction * W_dec_fd[~dead_f].norm(dim=-1).mean()
        b_enc_f[dead_f] = 0
        for parameter in (W_enc_fd, b_enc_f, W_dec_fd):
            self.adam.state[parameter]["exp_avg"][dead_f] = 0
            self.adam.state[parameter]["exp_avg_sq"][dead_f] = 0
        self.silent_steps_f[dead_f] = 0
        self.resampled += count
        return count

    def counts(self) -> dict[str, Tensor]:
        """What has happened since the last line of metrics."""
        return {name: getattr(self, name) for name in ("fired_f", "rows_counted", "sparse_rows", "resampled")}

    def state(self) -> dict[str, Tensor]:
        """References to every tensor that the next step depends on, by name."""
        tensors = {name: weight.detach() for name, weight in zip(Weights._fields, self.weights)}
        for name, weight in zip(Weights._fields, self.weights):
            tensors |= {f"adam.{name}.{moment}": self.adam.state[weight][moment] for moment in MOMENTS}
        return tensors | {"silent_steps_f": self.silent_steps_f} | self.counts()

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
