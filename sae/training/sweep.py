"""The dictionaries under training, together: weights, optimiser and firing counts; a step, and resampling of dead features.

k dictionaries, one for each L1 coefficient · b rows (tokens) · d model width · f features
Everything in training units (mean squared norm of the activations = d).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.objective import Backend, Step, Weights, Workspace, objective
from sae.objective.update import adam_state
from sae.training.config import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Sweep:
    """All start as copies of one dictionary. `state` and `restore` carry all that the next step and the next metrics depend on."""

    def __init__(self, dictionary: Dictionary, l1: Sequence[float], recipe: Recipe, backend: Backend, workspace: Workspace):
        self.l1, self.recipe, self.backend, self.workspace = l1, recipe, backend, workspace
        k, device = len(l1), dictionary.W_dec_fo.device
        start = (dictionary.W_enc_fd, dictionary.b_enc_f, dictionary.W_dec_fo, dictionary.b_dec_o)
        self.weights = Weights(*(weight.detach().repeat(k, *[1] * weight.ndim) for weight in start))
        self.l1_k = torch.tensor(l1, device=device)
        self.adam = torch.optim.Adam(self.weights, lr=recipe.lr, betas=recipe.betas, fused=True)
        adam_state(self.adam, self.weights)  # from the start, so that a checkpoint always has it
        self.silent_steps_kf = torch.zeros(k, dictionary.d_sae, dtype=torch.int64, device=device)
        self.fired_kf = torch.zeros_like(self.silent_steps_kf)
        self.rows_counted = torch.zeros((), dtype=torch.int64)
        self.sparse_rows_k = torch.zeros(k, dtype=torch.float64, device=device)
        self.resampled_k = torch.zeros(k, dtype=torch.int64)

    def dictionary(self, k: int) -> Dictionary:
        """The k-th one, sharing memory with the sweep."""
        return Dictionary.autoencoder(*self.weights.of(k)).requires_grad_(False)

    @torch.no_grad()
    def step(self, x_bd: Tensor, step: int) -> Step:
        """One update of all dictionaries, which also counts which features fired."""
        self.adam.param_groups[0]["lr"] = self.recipe.learning_rate(step)
        l1_k = self.l1_k * self.recipe.l1_share(step)
        result = objective(x_bd, self.weights, l1_k, self.backend, self.workspace, self.adam, self.recipe.clip)
        self.silent_steps_kf = torch.where(result.fired_f > 0, 0, self.silent_steps_kf + 1)
        self.fired_kf += result.fired_f
        self.rows_counted += len(x_bd)
        self.sparse_rows_k += result.sparse_share * len(x_bd)
        return result

    def dead_kf(self) -> Tensor:
        """Which features have not fired for `dead_steps` steps, [k, f] bool."""
        return self.silent_steps_kf >= self.recipe.dead_steps

    @torch.no_grad()
    def resample(self, x_bd: Tensor, step: int, k: int) -> int:
        """Points the k-th dictionary's dead features at what it reconstructs worst; gives their number.

        As in Towards Monosemanticity (2023): rows of the batch are drawn with probability proportional to their squared loss, the
        encoder row gets 0.2 of the mean norm of living ones, the bias 0, Adam's moments 0. The new direction is the row's residual
        rather than the row itself, since what is already explained needs no second feature.
        """
        dead_f = self.dead_kf()[k]
        count = int(dead_f.sum())  # host sync
        if not count or count == len(dead_f):
            return 0  # without a living feature there is no scale to follow
        residual_bd = x_bd - self.dictionary(k)(x_bd)
        loss_b = residual_bd.square().sum(-1)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        drawn = torch.multinomial(loss_b.double().square().cpu(), count, replacement=count > len(x_bd), generator=generator)  # host sync
        direction = torch.nn.functional.normalize(residual_bd[drawn.to(x_bd.device)], dim=-1)
        W_enc_fd, b_enc_f, W_dec_fd, _ = self.weights.of(k)
        W_enc_fd[dead_f] = direction * 0.2 * W_enc_fd[~dead_f].norm(dim=-1).mean()
        W_dec_fd[dead_f] = direction * W_dec_fd[~dead_f].norm(dim=-1).mean()
        b_enc_f[dead_f] = 0
        state = adam_state(self.adam, self.weights)
        for moments in (state.exp_avg.of(k), state.exp_avg_sq.of(k)):
            for moment in moments[:3]:
                moment[dead_f] = 0
        self.silent_steps_kf[k, dead_f] = 0
        self.resampled_k[k] += count
        return count

    def counts(self) -> dict[str, Tensor]:
        """What has happened since the last lines of metrics."""
        return {name: getattr(self, name) for name in ("fired_kf", "rows_counted", "sparse_rows_k", "resampled_k")}

    def state(self) -> dict[str, Tensor]:
        """References to every tensor that the next step depends on, by name."""
        tensors = dict(zip(Weights._fields, self.weights))
        for name, weight in zip(Weights._fields, self.weights):
            tensors |= {f"adam.{name}.{moment}": self.adam.state[weight][moment] for moment in MOMENTS}
        return tensors | {"silent_steps_kf": self.silent_steps_kf, "plan": self.workspace.plan} | self.counts()

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
