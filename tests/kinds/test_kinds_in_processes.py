"""The step of several processes that share a dictionary, against the step of one: every kind, every split."""

from functools import partial
from itertools import product

import pytest
import torch
from meshes import together
from test_every_kind import NAMES, assert_same, kind_of, now_of, own_of, problem

from sae.objective import Weights, Workspace, fast, objective
from sae.objective.step import WHOLE, Step

SPLITS = [(2, 1), (4, 1), (1, 2), (2, 2)]


def sharded(mesh, name, x_bd, y_bo, weights, own, dead_f, path) -> Step:
    kind, features = kind_of(name), mesh.features.part(len(dead_f))
    mine = Weights(*(tensor if field in WHOLE else tensor[features] for field, tensor in zip(Weights._fields, weights)))
    own = {field: tensor if field in WHOLE else tensor[features] for field, tensor in own.items()}
    goal = kind.goal(kind.values[0], now_of(kind, dead_f[features])._replace(mesh=mesh))
    rows = mesh.rows.part(len(x_bd))
    workspace = Workspace(mesh=mesh)
    return objective(x_bd[rows], mine, goal, path, workspace, y_bo=None if y_bo is None else y_bo[rows], own=own)


def joined(steps: list[Step], features: int, rows: int) -> Step:
    """The step of the whole, from every process's: gradients are summed over rows and laid side by side over features."""
    named = [dict(zip(Weights._fields, step.gradients)) | dict(step.own_gradients) for step in steps]
    whole = {}
    for name in named[0]:
        lines = [[named[i * rows + j][name] for j in range(rows)] for i in range(features)]
        whole[name] = lines[0][0] if name in WHOLE else torch.cat([sum(line[1:], line[0]) for line in lines])
    first = steps[0]
    fired_f = torch.cat([steps[i * rows].fired_f for i in range(features)])
    gradients = Weights(*(whole.pop(name) for name in Weights._fields))
    return first._replace(gradients=gradients, own_gradients=whole, fired_f=fired_f)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "p-annealing-early"])
def test_the_step_of_several_is_the_step_of_one(name, split, monkeypatch):
    monkeypatch.setattr(fast, "CHUNK_BYTES", 8 * 48 * 6)  # several chunks
    for seed, (path, transcodes) in enumerate(product(["dense", "sparse", "auto"], [False, True])):
        x_bd, y_bo, weights, dead_f = problem(seed, o=9 if transcodes else 12)
        if seed == 1:
            dead_f[:24] = False  # dead features in some processes only
        if seed % 2:
            x_bd = x_bd.round()  # ties
            weights = Weights(weights.W_enc_fd.round(), weights.b_enc_f.round(), weights.W_dec_fd, weights.b_dec_d.round())
        y_bo = y_bo if transcodes else None
        own, kind = own_of(kind_of(name), weights, y_bo), kind_of(name)
        whole = objective(x_bd, weights, kind.goal(kind.values[0], now_of(kind, dead_f)), path, y_bo=y_bo, own=own)
        steps = together(*split, partial(sharded, name=name, x_bd=x_bd, y_bo=y_bo, weights=weights, own=own, dead_f=dead_f, path=path))
        assert_same(joined(steps, *split), whole, 1e-10)
        for step in steps[1:]:
            assert all(torch.equal(getattr(step, number), getattr(steps[0], number)) for number in ("loss", "l0", "threshold"))
