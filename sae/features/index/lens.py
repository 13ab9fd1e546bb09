"""The logit lens: which tokens a feature's decoder row raises and lowers when it is read as if it were the last layer's output.

f features · d model width · v vocabulary
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sae.dictionaries.rows import ranges, rows_of
from sae.errors import InputError
from sae.model.opening.offload import device_of, on_hand
from sae.model.sites import parse_site

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel

KEPT = 20
IN_THE_STREAM = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
BEHIND_A_PROJECTION = {"head_out": "attn_out", "mlp_act": "mlp_out"}
BINS = 50  # of the histogram of a feature's values over the vocabulary, from its lowest to its highest
BLOCK_BYTES = 1 << 26  # of one block of logits
DESCRIPTION = (
    "W_U (g * P W_dec[j]) minus its mean over the vocabulary: the change of the logits for one unit of activation, up to the division by "
    "the residual's own size in the final norm; g is that norm's weight, P takes off the mean over the width where the norm does"
)


@torch.no_grad()
def into_residual(lm: "LanguageModel", site: str, rows_fd: Tensor) -> Tensor:
    """What directions at the site add to the residual stream, [f, d model]: themselves, or their projection by the module after the site.

    Raises `InputError` for a site from which more than one projection leads into the stream.
    """
    kind, layer = parse_site(site)
    if kind in IN_THE_STREAM:
        return rows_fd
    added = lm.place(f"{BEHIND_A_PROJECTION[kind]}.{layer}") if kind in BEHIND_A_PROJECTION else None
    projection: Any = lm.place(site).module
    if added is None or projection not in added.module.modules():
        raise InputError(f"directions at {site} have no place in the residual stream of {lm.name!r}: more than a projection lies between")
    weight = projection.weight
    rows_fd = rows_fd.to(device_of(projection), weight.dtype if weight.is_floating_point() else lm.dtype)
    written_fd = projection(rows_fd) - projection(torch.zeros_like(rows_fd[:1]))  # a bias is no part of any direction
    return (written_fd if added.view is None else added.view.read(written_fd, written_fd)).float()


@torch.no_grad()
def folded_unembedding(lm: "LanguageModel") -> tuple[Tensor, str]:
    """W_U with the final norm's linear part folded in, float32 [v, d], and a sentence that says what it is."""
    unembedding, norm = lm.model.get_output_embeddings(), lm.final_norm
    with on_hand(unembedding):
        W_U_vd = unembedding.weight.float()
    if norm is None:
        return W_U_vd, f"{DESCRIPTION} (this model has no final norm)"
    with on_hand(norm):
        return _folded(W_U_vd, norm)


def _folded(W_U_vd: Tensor, norm: Any) -> tuple[Tensor, str]:
    weight_d = getattr(norm, "weight", None)
    if isinstance(norm, nn.LayerNorm) or weight_d is None:  # OLMo's norm has no weight and does take the mean off
        W_U_vd = W_U_vd if weight_d is None else W_U_vd * weight_d.float().to(W_U_vd.device)
        return W_U_vd - W_U_vd.mean(dim=-1, keepdim=True), f"{DESCRIPTION} (LayerNorm)"  # W (x - mean x) = (W - row means) x
    gain_d = norm(torch.ones_like(weight_d)).float()  # an RMSNorm gives its gain, be that the weight or 1 + weight (Gemma)
    return W_U_vd * gain_d.to(W_U_vd.device), f"{DESCRIPTION} (RMSNorm)"


@torch.no_grad()
def logit_lens(
    W_dec_fd: Tensor, W_U_vd: Tensor, kept: int = KEPT, into: Callable[[Tensor], Tensor] = lambda rows_fd: rows_fd
) -> dict[str, np.ndarray]:
    """The `kept` highest and lowest tokens of each feature and their values: top_* from the highest, bottom_* from the lowest.

    And "lens_counts" [f, BINS]: how many tokens' values lie in each of `BINS` equal steps from the lowest to the highest. `into` takes a
    block of the rows into the residual stream, where they are not in it.
    """
    W_U_vd = W_U_vd - W_U_vd.mean(dim=0)  # a constant over the vocabulary does nothing to the softmax
    kept = min(kept, len(W_U_vd))
    rows = max(1, BLOCK_BYTES // (4 * len(W_U_vd)))
    top, bottom, counts = [], [], []
    for part in ranges(len(W_dec_fd), rows):
        block_fd = into(rows_of(W_dec_fd, part))
        logits_fv = block_fd.float().to(W_U_vd.device) @ W_U_vd.T
        top.append([x.cpu() for x in logits_fv.topk(kept)])  # host sync
        bottom.append([x.cpu() for x in logits_fv.topk(kept, largest=False)])  # host sync
        low_f1, high_f1 = (side[-1][0][:, :1].to(logits_fv.device) for side in (bottom, top))
        step_f1 = (high_f1 - low_f1).clamp(min=1e-30) / BINS
        bin_fv = logits_fv.sub_(low_f1).div_(step_f1).clamp_(max=BINS - 1).int()
        bin_fv += torch.arange(0, len(block_fd) * BINS, BINS, dtype=torch.int32, device=bin_fv.device)[:, None]
        counts.append(torch.bincount(bin_fv.flatten(), minlength=len(block_fd) * BINS).view(-1, BINS).cpu())  # host sync
    columns = {"lens_counts": torch.cat(counts).numpy().astype(np.uint32)}
    for side, blocks in (("top", top), ("bottom", bottom)):
        columns[f"{side}_token_values"] = torch.cat([values for values, _ in blocks]).numpy()
        columns[f"{side}_token_ids"] = torch.cat([ids for _, ids in blocks]).numpy().astype(np.int32)
    return columns
