"""The circuit's nodes as rows of its file: how active they are, and how strongly to steer with them.

n pairs · p positions · f features
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from sae.model.language_model import LanguageModel
from steering.circuits.features.files import NodeRow
from steering.circuits.features.passes import Line, Nodes
from steering.circuits.features.scores import parts_of
from steering.circuits.features.sites import FeatureSite
from steering.circuits.tasks.prompts import Prompts


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
