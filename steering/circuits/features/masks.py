"""Learned masks: a gate on every node, few of which stay open while the predictions stay those of the model.

m nodes that may differ · n nodes of a site · s sequences · v vocabulary
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.progress import Progress
from steering.circuits.features.passes import NodePatching, Nodes
from steering.circuits.features.sites import FeatureSite
from steering.circuits.finding.gates import drawn, opened
from steering.circuits.tasks.prompts import Prompts

ROUNDS = 150
LEARNING_RATE = 0.1
BEGIN = 2.0
"""initial log α of every gate: open with a probability of 0.97"""


def learned_masks(
    lm: LanguageModel,
    sites: Sequence[FeatureSite],
    prompts: Prompts,
    penalty: float,
    *,
    mean_of: Prompts | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
    bar: Progress | None = None,
) -> Nodes:
    """The probability that each node's gate is open, [n] of each site: of KL(model ‖ circuit) at the last position plus `penalty` nats for
    each open gate, by Adam. A round is a forward and backward pass of a batch.

    Errors have no gate and stay as they are. Raises `InputError` for a penalty that is not above 0.
    """
    if not penalty > 0:
        raise InputError(f"expected a penalty above 0, in nats for each node, got {penalty:g}")
    patching = NodePatching(lm, sites, prompts, mean_of)
    differs = [differing.cpu() for differing in patching.differing()]
    sizes = [int(one_n.sum()) for one_n in differs]
    generator = torch.Generator().manual_seed(seed)
    log_alpha_m = torch.full((sum(sizes),), BEGIN, requires_grad=True)
    optimizer = torch.optim.Adam([log_alpha_m], lr=LEARNING_RATE)
    clean = [patching.clean_logits(batch).log_softmax(-1) for batch in range(len(patching.batches()))]
    for number in range(rounds):
        batch = number % len(clean)
        keep = _spread(sites, differs, drawn(log_alpha_m, generator).split(sizes))
        with torch.enable_grad():
            masked_sv = patching.logits(keep, batch).log_softmax(-1)
            kl = (clean[batch].exp() * (clean[batch] - masked_sv)).sum(-1).mean()
            loss = kl.to(log_alpha_m) + penalty * opened(log_alpha_m).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if bar is not None:
            bar.advance(1, nodes=f"{float(opened(log_alpha_m.detach()).sum()):,.0f}", KL=f"{kl.detach().item():.3f}")  # host sync
    found = _spread(sites, differs, opened(log_alpha_m.detach()).split(sizes))
    for site, one_n in zip(sites, found):
        one_n[site.error] = 0
    return found


def _spread(sites: Sequence[FeatureSite], differs: Sequence[Tensor], gates: Sequence[Tensor]) -> Nodes:
    """Gates at the nodes that have one, 0 at the others and 1 at errors."""
    found = []
    for site, one_n, gate_m in zip(sites, differs, gates):
        keep_n = torch.zeros(site.n_nodes).index_put((one_n.nonzero()[:, 0],), gate_m)
        keep_n[site.error] = 1
        found.append(keep_n)
    return found
