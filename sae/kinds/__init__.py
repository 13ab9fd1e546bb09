"""Kinds of dictionaries that can be trained, one file and one row each. Their common part is in kind.py, the step itself in
sae/objective."""

from sae.kinds.batchtopk import BatchTopK, Matryoshka
from sae.kinds.gated import Gated
from sae.kinds.jumprelu import JumpReLU
from sae.kinds.kind import Kind, Now
from sae.kinds.p_annealing import PAnnealing
from sae.kinds.relu import ReLU
from sae.kinds.topk import AbsTopK, TopK

KINDS: dict[str, type[Kind]] = {
    "relu": ReLU,
    "p-annealing": PAnnealing,
    "topk": TopK,
    "abstopk": AbsTopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "gated": Gated,
}


def name_of(kind: Kind) -> str:
    return next(name for name, one in KINDS.items() if one is type(kind))


__all__ = ["KINDS", "AbsTopK", "BatchTopK", "Gated", "JumpReLU", "Kind", "Matryoshka", "Now", "PAnnealing", "ReLU", "TopK", "name_of"]
