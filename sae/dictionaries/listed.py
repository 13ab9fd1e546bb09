"""The choice of a gate out of a list of entries."""

import torch

from sae.dictionaries.gates import TopK
from sae.entries import Entries


def chosen_entries(entries: Entries, rows: int, gate: TopK) -> Entries:
    """What TopK chooses out of entries that contain its choice."""
    counts_b = torch.bincount(entries.row_n, minlength=rows)
    at_n = torch.arange(len(entries.row_n), device=entries.row_n.device) - (counts_b.cumsum(0) - counts_b)[entries.row_n]
    width = max(1, int(counts_b.max())) if rows else 1  # host sync
    value_bm = entries.value_n.new_zeros((rows, width))
    feature_bm = entries.feature_n.new_zeros((rows, width))
    value_bm[entries.row_n, at_n], feature_bm[entries.row_n, at_n] = entries.value_n, entries.feature_n
    place_bk, value_bk = gate.choose([(0, value_bm)], width)
    row_n, place_n = value_bk.nonzero(as_tuple=True)  # host sync
    return Entries(row_n.int(), feature_bm[row_n, place_bk[row_n, place_n]], value_bk[row_n, place_n])
