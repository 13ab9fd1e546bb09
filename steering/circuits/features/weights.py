"""The circuit's nodes as rows of its file: how active they are, and how strongly to steer with them.

n pairs · p positions · f features
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.model.language_model import LanguageModel
from sae.statistics import mean_estimate
from steering.circuits.features.files import NodeRow
from steering.circuits.features.passes import Line, Nodes
from steering.circuits.features.scores import parts_of
from steering.circuits.features.sites import FeatureSite
from steering.circuits.tasks.prompts import Prompts
from steering.directions.random import random_direction
from steering.intervention import steered
from steering.vector import SteeringVector

RANDOM = 10
"""number of random directions that a vector is compared with"""


def node_rows(
    lm: LanguageModel, sites: Sequence[FeatureSite], prompts: Prompts, score_n: Nodes, inside: Nodes, frequency: Sequence[Tensor]
) -> tuple[list[NodeRow], list[str]]:
    """The circuit's nodes, the strongest first, and the answer that their weights steer towards: the pairs' most frequent right one.

    A feature's weight is how far its largest value in a prompt is higher on the clean prompts of that answer than on their corrupt sides.
    """
    answer = Counter(pair.right for pair in prompts.pairs).most_common(1)[0][0]
    clean, corrupt = (_largest(lm, sites, prompts, share) for share in (0.0, 1.0))
    of_answer_n = torch.tensor([pair.right == answer for pair in prompts.pairs])
    rows: list[NodeRow] = []
    for number, (site, one_n) in enumerate(zip(sites, inside)):
        for node in one_n.nonzero()[:, 0].tolist():
            row: NodeRow = {
                "node": site.name(node),
                "score": float(score_n[number][node]),
                "clean": 0.0,
                "corrupt": 0.0,
                "weight": 0.0,
                "frequency": 0.0,
            }
            if node < site.d_sae:
                one, other = clean[number][:, node], corrupt[number][:, node]
                row["clean"], row["corrupt"] = float(one.mean()), float(other.mean())
                row["weight"] = float((one - other)[of_answer_n].mean())
                row["frequency"] = float(frequency[number][node])
            rows.append(row)
    return sorted(rows, key=lambda row: -abs(row["score"])), list(answer)


def _largest(lm: LanguageModel, sites: Sequence[FeatureSite], prompts: Prompts, share: float) -> list[Tensor]:
    """Of each site, the largest value over the real positions of each prompt, [n, f]; of values below 0 the lowest, where it is larger."""
    found: list[list[Tensor]] = [[] for _ in sites]
    for part in parts_of(sites, prompts):
        for one, split in zip(found, Line(lm, sites, part).splits(share)):
            mask_np = part.clean_mask_np.bool().to(split.value_spf.device)
            value_npf = torch.where(mask_np[..., None], split.value_spf, 0)
            high_nf, low_nf = value_npf.amax(1), value_npf.amin(1)
            one.append(torch.where(-low_nf > high_nf, low_nf, high_nf).cpu())
    return [torch.cat(one) for one in found]


def circuit_vector(
    lm: LanguageModel, sites: Sequence[FeatureSite], rows: Sequence[NodeRow], answer: Sequence[str]
) -> SteeringVector | None:
    """Σ weight · W_dec over the circuit's features, at each site that has some: coefficient 1 makes them as active as on the clean side.

    None where no feature is more or less active there.
    """
    weights, directions = {row["node"]: row["weight"] for row in rows}, {}
    for site in sites:
        features_k = torch.tensor([node for node in range(site.d_sae) if weights.get(site.name(node))], dtype=torch.long)
        if len(features_k):
            weight_k = torch.tensor([weights[site.name(node)] for node in features_k.tolist()])
            rows_ko = site.rows(features_k)
            directions[site.writes] = weight_k.to(rows_ko) @ rows_ko
    if not directions:
        return None
    return SteeringVector(
        directions, {"method": "feature circuit", "answer": list(answer), "model": lm.name, "fingerprint": lm.fingerprint()}
    )


@torch.no_grad()
def steering_effect(lm: LanguageModel, vector: SteeringVector, prompts: Prompts, answer: Sequence[str], seed: int) -> dict[str, Any] | None:
    """The effect of adding the vector everywhere in the corrupt prompts on the metric of the held-out pairs with its answer, for the JSON.

    "random" is the same with `RANDOM` random directions of the same length. None if no held-out pair has the answer.
    """
    numbers = [number for number, pair in enumerate(prompts.pairs) if list(pair.right) == list(answer)]
    if not numbers:
        return None
    chosen = prompts.subset(numbers)

    def metric_n(ids: Tensor, mask: Tensor, added: SteeringVector | None = None) -> np.ndarray:
        with steered(lm, [] if added is None else [added]):
            return chosen.measure(lm.logits(ids, mask)[:, -1]).double().cpu().numpy()  # host sync

    corrupt = chosen.corrupt_np, chosen.corrupt_mask_np
    clean_n, corrupt_n = metric_n(chosen.clean_np, chosen.clean_mask_np), metric_n(*corrupt)
    others = []
    for draw in range(RANDOM):
        directions = {
            site: random_direction(len(direction), site, seed * RANDOM + draw, float(direction.norm())).direction_d
            for site, direction in vector.directions.items()
        }
        others.append(float((metric_n(*corrupt, SteeringVector(directions)) - corrupt_n).mean()))
    return {
        "answer": list(answer),
        "pairs": len(numbers),
        "clean_minus_corrupt": mean_estimate(clean_n - corrupt_n, seed),
        "steered_minus_corrupt": mean_estimate(metric_n(*corrupt, vector) - corrupt_n, seed),
        "random": others,
    }
