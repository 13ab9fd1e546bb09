"""Examples of a crosscoder's features: windows of text around their strongest tokens, and each model's contribution there.

m tokens of all windows · k chosen features · d width of both sites together
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.dictionaries.dictionary import Dictionary
from sae.features.index.reader import Context

if TYPE_CHECKING:
    from sae.activations.joined import JoinedCache

BEFORE, AFTER = 16, 8
"""tokens of a window around the firing one"""


class Example(NamedTuple):
    context: Context
    reads: tuple[float, ...]
    """contribution of each model's activation to the feature's pre-activation at the token"""


@torch.no_grad()
def examples(
    dictionary: Dictionary, cache: "JoinedCache", split: str, chosen: Mapping[int, Sequence[int]], pieces: Sequence[bytes] | None
) -> dict[int, list[Example]]:
    """feature -> one for each of its positions. `pieces`: the bytes of every token id; None shows ids."""
    tokens, features = cache.tokens, list(chosen)
    starts = np.asarray(tokens.sequence_starts)
    centres = sorted({position for positions in chosen.values() for position in positions})
    if not centres:
        return {feature: [] for feature in chosen}
    sequence_of = dict(zip(centres, np.asarray(tokens.sequence_of(np.array(centres))).tolist()))
    spans = {c: (max(c - BEFORE, int(starts[s])), min(c + AFTER + 1, int(starts[s + 1]))) for c, s in sequence_of.items()}
    wanted = np.unique(np.concatenate([np.arange(*span) for span in spans.values()]))
    positions_m, x_md = _rows_at(cache, split, wanted)
    x_md = x_md.to(dictionary.W_enc_fd.device)
    acts_mk = dictionary.activations(x_md, features).float().cpu().numpy()
    reads_mkp = _reads(dictionary, x_md, features).cpu().numpy()
    row_of = {int(position): row for row, position in enumerate(positions_m)}
    found: dict[int, list[Example]] = {}
    for k, feature in enumerate(features):
        found[feature] = []
        for centre in chosen[feature]:
            first, last = spans[centre]
            rows = [row_of.get(position) for position in range(first, last)]
            ids = np.asarray(tokens.ids[first:last])
            values = np.array([0.0 if row is None else acts_mk[row, k] for row in rows], dtype=np.float32)
            document = int(tokens.sequence_document[sequence_of[centre]])
            label = int(tokens.document_label[document])
            context = Context(
                centre,
                centre - first,
                ids,
                values,
                np.array([row is not None for row in rows]),
                texts_of(ids, pieces),
                document,
                tokens.label_names[label] if label >= 0 else None,
            )
            found[feature].append(Example(context, tuple(reads_mkp[row_of[centre], k].tolist())))
    return found


def texts_of(ids: np.ndarray, pieces: Sequence[bytes] | None) -> list[str]:
    from sae.model.vocabulary import Vocabulary

    if pieces is None:
        return [f"⟨{i}⟩" for i in ids.tolist()]
    return Vocabulary(list(pieces), np.zeros(len(pieces), bool)).texts(ids.tolist())


def _rows_at(cache: "JoinedCache", split: str, wanted: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Global positions [m] that the cache has of the wanted ones, and their rows, float32 [m, d]."""
    positions, rows = [], []
    for shard in cache.shards(split):
        x_nd, positions_n = cache.read(shard)
        here_n = np.flatnonzero(np.isin(positions_n.numpy(), wanted))
        positions.append(positions_n.numpy()[here_n])
        rows.append(x_nd[torch.from_numpy(here_n)].float())
    return np.concatenate(positions), torch.cat(rows)


def _reads(dictionary: Dictionary, x_md: Tensor, features: Sequence[int]) -> Tensor:
    """The contribution of each site to the pre-activations, [m, k, p]; their sum plus b_enc is the pre-activation."""
    rows_kd = dictionary.encoder_rows(features).to(dictionary.dtype)
    input_md = dictionary.encoder_input(x_md)
    widths = [port.width for port in dictionary.reads]
    return torch.stack([x @ rows.T for x, rows in zip(input_md.split(widths, -1), rows_kd.split(widths, -1))], dim=-1)
