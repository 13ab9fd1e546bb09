"""Dictionaries that train together: weights, optimiser and firing counts; a step, and resampling of dead features.

With several processes (sae/mesh.py), each has a part of the features and sums over a part of a batch's rows.

k dictionaries, each with its value of the kind's swept option · b rows (tokens) · d width that is read · o written · f features. Everything
is in training units (mean squared norm of the activations = their width).
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.gates import Choice
from sae.entries import largest
from sae.kinds import Kind, Now
from sae.mesh import Axis
from sae.objective import Adam, Backend, Own, Step, Weights, Workspace, objective
from sae.objective.choice import kept_of_rows
from sae.objective.step import WHOLE, of
from sae.training.config import Recipe


class Start(NamedTuple):
    """The start of one dictionary of a sweep."""

    dictionary: Dictionary
    """with this process's features"""
    seed: int = 0
    """seed of its resampling"""
    own: Own = MappingProxyType({})
    """initial values of the kind's own parameters, instead of the usual ones"""


class Sweep:
    """One dictionary for each of the kind's values. `states` returns everything that the next step and the next metrics depend on."""

    def __init__(
        self,
        starts: Sequence[Start],
        kind: Kind,
        recipe: Recipe,
        backend: Backend,
        workspace: Workspace,
        device: torch.device | None = None,
    ):
        """`device`: by default that of the dictionaries."""
        self.kind, self.recipe, self.backend, self.workspace, self.mesh = kind, recipe, backend, workspace, workspace.mesh
        self.values, self.seeds = kind.values, [start.seed for start in starts]
        first = starts[0].dictionary
        self.transcodes, self.sites = first.is_transcoder, len(first.writes)
        k, device = len(starts), device or first.W_dec_fo.device

        def stacked(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack([tensor.detach().to(device) for tensor in tensors])

        wholes = [self._started(start) for start in starts]
        stacks = {name: stacked([one[name] for one in wholes]) for name in wholes[0]}
        self.weights = Weights(*(stacks.pop(name) for name in Weights._fields))
        self.own = stacks
        self.kept = {name: stacked([tensor] * k) for name, tensor in kind.state().items()}
        self.parameters = {name: tensor if name in WHOLE else self._mine(tensor) for name, tensor in self._whole().items()}
        """the tensors that this process updates: if rows are split too, an equal part of its features"""
        self.adam = Adam(self.parameters.values(), recipe.lr, recipe.betas)
        self.silent_steps_kf = torch.zeros(k, first.d_sae, dtype=torch.int64, device=device)
        self.fired_kf = torch.zeros_like(self.silent_steps_kf)
        self.rows_counted = torch.zeros((), dtype=torch.int64)
        self.sparse_rows_k = torch.zeros(k, dtype=torch.float64, device=device)
        self.resampled_k = torch.zeros(k, dtype=torch.int64)

    def _started(self, start: Start) -> dict[str, Tensor]:
        d = start.dictionary
        weights = dict(zip(Weights._fields, (d.W_enc_fd, d.b_enc_f, d.W_dec_fo, d.b_dec_o)))
        skip = {} if d.W_skip_od is None else {"W_skip_od": d.W_skip_od}
        return weights | self.kind.own(d.d_out, d.d_sae) | dict(start.own) | skip

    def _whole(self) -> dict[str, Tensor]:
        return dict(zip(Weights._fields, self.weights)) | self.own

    def _mine(self, tensor_kf: Tensor) -> Tensor:
        """The part of a tensor that this process updates."""
        rows = self.mesh.rows
        return tensor_kf if rows.alone else tensor_kf[:, rows.part(tensor_kf.shape[1])].clone()

    def _take_over(self) -> None:
        """Called after a change to the weights that Adam did not make."""
        for name, tensor in self._whole().items():
            if name not in WHOLE and not self.mesh.rows.alone:
                self.parameters[name].copy_(self._mine(tensor))

    def dictionary(self, k: int) -> Dictionary:
        """The k-th dictionary now, sharing memory with the sweep; with several processes, only this one's features."""
        return self._dictionary(self.weights.of(k), of(self.own, k), k)

    def own_part(self, k: int) -> Dictionary:
        """`dictionary` with only the features that this process updates, which no other process has."""
        own = of(self.parameters, k)
        return self._dictionary(Weights(*(own.pop(name) for name in Weights._fields)), own, k)

    def _dictionary(self, weights: Weights, own: Own, k: int) -> Dictionary:
        W_enc_fd, b_enc_f, gate = self.kind.encoder(weights, own, of(self.kept, k), self.values[k])
        b_in_d = None if self.transcodes else weights.b_dec_d
        W_skip_od = own.get("W_skip_od")
        found = Dictionary(W_enc_fd, b_enc_f, weights.W_dec_fd, weights.b_dec_d, gate=gate, b_in_d=b_in_d, W_skip_od=W_skip_od)
        return found.requires_grad_(False)

    def now(self, k: int, step: int) -> Now:
        d_out = self.weights.W_dec_fd.shape[-1]
        return Now(step, self.recipe.steps, d_out, self.dead_kf()[k], of(self.kept, k), self.sites, self.mesh)

    @torch.no_grad()
    def step(self, x_bd: Tensor, step: int, y_bo: Tensor | None = None) -> Step:
        """One update of all dictionaries; also counts which features fired. `y_bo`: the targets of transcoders.

        With several processes, all have the whole batch.
        """
        rows, mine = len(x_bd), self.mesh.rows.part(len(x_bd))
        x_bd, y_bo = x_bd[mine], None if y_bo is None else y_bo[mine]
        self.adam.lr = self.recipe.learning_rate(step)
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
        self._take_over()
        self.silent_steps_kf = torch.where(result.fired_f > 0, 0, self.silent_steps_kf + 1)
        self.fired_kf += result.fired_f
        self.rows_counted += rows
        self.sparse_rows_k += result.sparse_share * rows
        return result

    def dead_kf(self) -> Tensor:
        """Which features have not fired for `dead_steps` steps, [k, f] bool."""
        return self.silent_steps_kf >= self.recipe.dead_steps

    def dead_share(self, k: int) -> float:
        """Share of the k-th dictionary's features that are dead."""
        features = self.mesh.features
        return sum(features.numbers(float(self.dead_kf()[k].float().mean()))) / features.size

    @torch.no_grad()
    def resample(self, x_bd: Tensor, step: int, k: int, y_bo: Tensor | None = None) -> int:
        """Restarts the k-th dictionary's dead features at badly reconstructed rows; returns their number.

        As in Towards Monosemanticity (2023): rows of the batch are drawn with probability proportional to their squared loss; the encoder
        row gets 0.2 of the mean norm of living ones, the bias 0, Adam's moments 0. The new direction is the row's residual instead of the
        row itself, since the explained part needs no second feature; a transcoder's feature reads the row itself.
        """
        dead_f, features = self.dead_kf()[k], self.mesh.features
        dead = [int(number) for number in features.numbers(int(dead_f.sum()))]  # host sync; of each process
        count, before = sum(dead), sum(dead[: features.rank])
        if not count or count == len(dead_f) * features.size:
            return 0  # without a living feature there is no scale to follow
        residual_bo = (x_bd if y_bo is None else y_bo) - self.written(x_bd, k)
        loss_b = residual_bo.square().sum(-1)
        generator = torch.Generator().manual_seed(self.seeds[k] * 1_000_003 + step)
        drawn = torch.multinomial(loss_b.double().square().cpu(), count, replacement=count > len(x_bd), generator=generator)  # host sync
        drawn = drawn[before : before + dead[features.rank]].to(x_bd.device)
        written = torch.nn.functional.normalize(residual_bo[drawn], dim=-1)
        read = written if y_bo is None else torch.nn.functional.normalize(x_bd[drawn], dim=-1)
        W_enc_fd, b_enc_f, W_dec_fd, _ = self.weights.of(k)
        W_enc_fd[dead_f] = read * 0.2 * self._mean(W_enc_fd[~dead_f].norm(dim=-1))
        W_dec_fd[dead_f] = written * self._mean(W_dec_fd[~dead_f].norm(dim=-1))
        b_enc_f[dead_f] = 0
        start = self.kind.own(W_dec_fd.shape[-1], len(dead_f))
        for name, tensor in start.items():  # each has one number for a feature
            self.own[name][k][dead_f] = tensor.to(dead_f.device)[dead_f]
        self._take_over()
        mine_f = dead_f[self.mesh.rows.part(len(dead_f))]
        for name, *moments in zip(self.parameters, self.adam.exp_avg, self.adam.exp_avg_sq):
            if name not in WHOLE:
                for moment in moments:
                    moment[k][mine_f] = 0
        self.silent_steps_kf[k, dead_f] = 0
        self.resampled_k[k] += count
        return count

    def _mean(self, norm_n: Tensor) -> Tensor:
        """The mean over all processes' features."""
        total, count = self.mesh.features.sums(norm_n.sum(), norm_n.new_tensor(len(norm_n)))
        return total / count

    def written(self, x_bd: Tensor, k: int) -> Tensor:
        """The k-th dictionary's output for rows, [b, o]: the sum over all processes' features."""
        return acts_and_output(self.dictionary(k), x_bd, self.mesh.features)[1]

    def counts(self) -> dict[str, Tensor]:
        """Counts since the last lines of metrics."""
        return {name: getattr(self, name) for name in ("fired_kf", "rows_counted", "sparse_rows_k", "resampled_k")}

    def forget_counts(self) -> None:
        """Resets the counts after lines of metrics."""
        for count in self.counts().values():
            count.zero_()

    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """References to all tensors that the next step depends on, by name: those split over processes by features, and the others."""
        mine = self.mesh.rows.part(self.silent_steps_kf.shape[1])
        split = {"silent_steps_kf": self.silent_steps_kf[:, mine], "fired_kf": self.fired_kf[:, mine]}
        whole = {name: tensor for name, tensor in self.counts().items() if name not in split}
        whole |= {"plan": self.workspace.plan, "encoder": self.workspace.encoder_number}
        whole |= {f"kept.{name}": tensor for name, tensor in self.kept.items()}
        for i, (name, parameter) in enumerate(self.parameters.items()):
            shown = name if name in Weights._fields else f"own.{name}"
            of_parameter = {
                shown: parameter,
                f"adam.{shown}.exp_avg": self.adam.exp_avg[i],
                f"adam.{shown}.exp_avg_sq": self.adam.exp_avg_sq[i],
            }
            (whole if name in WHOLE else split).update(of_parameter)
            whole[f"adam.{shown}.step"] = self.adam.steps[i]
        return split, whole

    def gather(self) -> None:
        """Called after this process's part was set: gets the others' parts of the weights that it computes with."""
        rows = self.mesh.rows
        for name, tensor in self._whole().items():
            if name not in WHOLE:
                rows.gather_parts_(tensor, self.parameters[name], 1)
        for tensor in (self.silent_steps_kf, self.fired_kf):
            rows.gather_parts_(tensor, tensor[:, rows.part(tensor.shape[1])].contiguous(), 1)


@torch.no_grad()
def acts_and_output(part: Dictionary, x_bd: Tensor, features: Axis) -> tuple[Tensor, Tensor]:
    """Activations of this process's `part` of a dictionary's features, [b, f], and the whole dictionary's output, [b, o]."""
    acts_bf = part.encode(x_bd)
    if features.alone:
        return acts_bf, part.decode(acts_bf, x_bd)
    if isinstance(part.gate, Choice):  # each process has chosen k of its own
        kept_bk = largest(acts_bf.abs(), part.gate.k)
        value_bk = kept_of_rows(acts_bf.abs().gather(1, kept_bk), part.gate.k, features)
        acts_bf = torch.zeros_like(acts_bf).scatter(1, kept_bk, acts_bf.gather(1, kept_bk) * (value_bk > 0))
    y_bo = features.sum_(part.written(acts_bf)) + part.b_dec_o
    return acts_bf, part.completed(y_bo, x_bd) if part.decodes_with_input else y_bo
