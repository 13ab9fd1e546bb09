"""The dictionaries under training, together: weights, optimiser and firing counts; a step, and resampling of dead features.

k dictionaries, one for each value of the kind's swept option · b rows (tokens) · d width that is read · o written · f features
Everything in training units (mean squared norm of the activations = their width).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.kinds import Kind, Now
from sae.objective import Backend, Step, Weights, Workspace, objective
from sae.objective.step import of
from sae.objective.update import moments
from sae.training.config import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Sweep:
    """All start as copies of one dictionary. `state` carries all that the next step and the next metrics depend on."""

    def __init__(
        self,
        dictionary: Dictionary,
        kind: Kind,
        recipe: Recipe,
        backend: Backend,
        workspace: Workspace,
        own: Mapping[str, Tensor] | None = None,
    ):
        """`own`: values at which the kind's own parameters start, in the place of its usual ones."""
        self.kind, self.recipe, self.backend, self.workspace = kind, recipe, backend, workspace
        self.values = kind.values
        self.transcodes, self.sites = dictionary.is_transcoder, len(dictionary.writes)
        k, device = len(self.values), dictionary.W_dec_fo.device

        def copies(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device).repeat(k, *[1] * tensor.ndim)

        self.weights = Weights(*map(copies, (dictionary.W_enc_fd, dictionary.b_enc_f, dictionary.W_dec_fo, dictionary.b_dec_o)))
        owns = kind.own(dictionary.d_out, dictionary.d_sae) | dict(own or {})
        if dictionary.W_skip_od is not None:
            owns["W_skip_od"] = dictionary.W_skip_od
        self.own = {name: copies(tensor) for name, tensor in owns.items()}
        self.kept = {name: copies(tensor) for name, tensor in kind.state().items()}
        self.parameters = [*self.weights, *self.own.values()]
        self.adam = torch.optim.Adam(self.parameters, lr=recipe.lr, betas=recipe.betas, fused=True)
        moments(self.adam, self.parameters)  # from the start, so that a checkpoint always has it
        self.silent_steps_kf = torch.zeros(k, dictionary.d_sae, dtype=torch.int64, device=device)
        self.fired_kf = torch.zeros_like(self.silent_steps_kf)
        self.rows_counted = torch.zeros((), dtype=torch.int64)
        self.sparse_rows_k = torch.zeros(k, dtype=torch.float64, device=device)
        self.resampled_k = torch.zeros(k, dtype=torch.int64)

    def dictionary(self, k: int) -> Dictionary:
        """The k-th one as it is now, sharing memory with the sweep."""
        weights, own = self.weights.of(k), of(self.own, k)
        W_enc_fd, b_enc_f, gate = self.kind.encoder(weights, own, of(self.kept, k), self.values[k])
        b_in_d = None if self.transcodes else weights.b_dec_d
        W_skip_od = own.get("W_skip_od")
        found = Dictionary(W_enc_fd, b_enc_f, weights.W_dec_fd, weights.b_dec_d, gate=gate, b_in_d=b_in_d, W_skip_od=W_skip_od)
        return found.requires_grad_(False)

    def now(self, k: int, step: int) -> Now:
        d_out = self.weights.W_dec_fd.shape[-1]
        return Now(step, self.recipe.steps, d_out, self.dead_kf()[k], of(self.kept, k), self.sites)

    @torch.no_grad()
    def step(self, x_bd: Tensor, step: int, y_bo: Tensor | None = None) -> Step:
        """One update of all dictionaries, which also counts which features fired. `y_bo`: what transcoders are to write."""
        self.adam.param_groups[0]["lr"] = self.recipe.learning_rate(step)
        nows = [self.now(k, step) for k in range(len(self.values))]
        for k, (value, now) in enumerate(zip(self.values, nows)):
            self.kind.before(x_bd, y_bo, self.weights.of(k), of(self.own, k), value, now)
        goals = [self.kind.goal(value, now) for value, now in zip(self.values, nows)]
        result = objective(
            x_bd,
            self.weights,
            goals,
            self.backend,
            self.workspace,
            self.adam,
            self.recipe.clip,
            y_bo=y_bo,
            own=self.own,
            unit_rows=self.kind.unit_rows,
        )
        for k, now in enumerate(nows):
            self.kind.after(result.of(k), of(self.own, k), now)
        self.silent_steps_kf = torch.where(result.fired_f > 0, 0, self.silent_steps_kf + 1)
        self.fired_kf += result.fired_f
        self.rows_counted += len(x_bd)
        self.sparse_rows_k += result.sparse_share * len(x_bd)
        return result

    def dead_kf(self) -> Tensor:
        """Which features have not fired for `dead_steps` steps, [k, f] bool."""
        return self.silent_steps_kf >= self.recipe.dead_steps

    @torch.no_grad()
    def resample(self, x_bd: Tensor, step: int, k: int, y_bo: Tensor | None = None) -> int:
        """Points the k-th dictionary's dead features at what it reconstructs worst; gives their number.

        As in Towards Monosemanticity (2023): rows of the batch are drawn with probability proportional to their squared loss, the
        encoder row gets 0.2 of the mean norm of living ones, the bias 0, Adam's moments 0. The new direction is the row's residual
        rather than the row itself, since what is already explained needs no second feature; a transcoder's feature reads the row itself.
        """
        dead_f = self.dead_kf()[k]
        count = int(dead_f.sum())  # host sync
        if not count or count == len(dead_f):
            return 0  # without a living feature there is no scale to follow
        residual_bo = (x_bd if y_bo is None else y_bo) - self.dictionary(k)(x_bd)
        loss_b = residual_bo.square().sum(-1)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        drawn = torch.multinomial(loss_b.double().square().cpu(), count, replacement=count > len(x_bd), generator=generator)  # host sync
        drawn = drawn.to(x_bd.device)
        written = torch.nn.functional.normalize(residual_bo[drawn], dim=-1)
        read = written if y_bo is None else torch.nn.functional.normalize(x_bd[drawn], dim=-1)
        W_enc_fd, b_enc_f, W_dec_fd, _ = self.weights.of(k)
        W_enc_fd[dead_f] = read * 0.2 * W_enc_fd[~dead_f].norm(dim=-1).mean()
        W_dec_fd[dead_f] = written * W_dec_fd[~dead_f].norm(dim=-1).mean()
        b_enc_f[dead_f] = 0
        start = self.kind.own(W_dec_fd.shape[-1], len(dead_f))
        for name, tensor in start.items():  # each has one number for a feature
            self.own[name][k][dead_f] = tensor.to(dead_f.device)[dead_f]
        features = [*self.weights[:3], *(self.own[name] for name in start)]
        for parameter, state in zip(self.parameters, moments(self.adam, self.parameters)):
            if any(parameter is one for one in features):
                state["exp_avg"][k][dead_f] = 0
                state["exp_avg_sq"][k][dead_f] = 0
        self.silent_steps_kf[k, dead_f] = 0
        self.resampled_k[k] += count
        return count

    def counts(self) -> dict[str, Tensor]:
        """What has happened since the last lines of metrics."""
        return {name: getattr(self, name) for name in ("fired_kf", "rows_counted", "sparse_rows_k", "resampled_k")}

    def state(self) -> dict[str, Tensor]:
        """References to every tensor that the next step depends on, by name."""
        tensors = dict(zip(Weights._fields, self.weights)) | {f"own.{name}": tensor for name, tensor in self.own.items()}
        for name, parameter in list(tensors.items()):
            tensors |= {f"adam.{name}.{moment}": self.adam.state[parameter][moment] for moment in MOMENTS}
        tensors |= {f"kept.{name}": tensor for name, tensor in self.kept.items()}
        decided = {"plan": self.workspace.plan, "encoder": self.workspace.encoder_number}
        return tensors | {"silent_steps_kf": self.silent_steps_kf} | decided | self.counts()
