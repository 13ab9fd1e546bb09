"""Names of the places where a causal LM's vectors flow; sae/model/structure/inspection.py finds them in a model.

With L counted from 0, in the order in which they are computed:

`embed`               the tokens' embeddings, before positions are added
`resid_pre.L`         the residual stream before block L
`attn_in.L`           what the attention receives: after the norm and its gain, where there is a norm
`q.L`, `k.L`, `v.L`   queries, keys and values of all heads as their projections give them, before a norm of theirs and before rotation
`head_out.L`          the heads' outputs, concatenated, before the output projection
`attn_out.L`          what the attention adds to the stream
`resid_mid.L`         the stream between attention and MLP
`mlp_in_nogain.L`     mlp_in before the norm's gain and bias
`mlp_in.L`            what the MLP receives: after the norm and its gain, where there is a norm
`mlp_act.L`           the neurons: what the MLP's last projection receives
`mlp_out.L`           what the MLP adds to the stream
`resid_post.L`        the residual stream after block L

Where a second model reads the same tokens, its sites stand after its name and a slash: `chat/resid_post.2`.
"""

import re
from typing import NamedTuple

from sae.errors import InputError

EMBED = "embed"
KINDS = (
    *("resid_pre", "attn_in", "q", "k", "v", "head_out", "attn_out", "resid_mid"),
    *("mlp_in_nogain", "mlp_in", "mlp_act", "mlp_out", "resid_post"),
)
"""sites of each block"""
MODEL = r"[A-Za-z][A-Za-z0-9_-]{0,31}"
"""allowed names of a second model"""


class Site(NamedTuple):
    kind: str
    layer: int
    """-1 for `embed`, which precedes all blocks"""

    def __str__(self) -> str:
        return self.kind if self.kind == EMBED else f"{self.kind}.{self.layer}"


def parse_site(text: str | Site, n_layers: int | None = None) -> Site:
    """`"resid_post.2"` -> `Site("resid_post", 2)`; with `n_layers`, only a site that a model with so many blocks can have.

    Raises `InputError` that lists the sites there are.
    """
    if str(text) == EMBED:
        return Site(EMBED, -1)
    name, own = split_model(str(text))
    if name is not None:
        raise InputError(f"expected a site of one model, got {text}, a site of the second model {name!r}; give {own} of that model")
    match = re.fullmatch(r"([a-z_]+)\.(0|[1-9][0-9]*)", str(text))
    if match and match[1] in KINDS and (n_layers is None or int(match[2]) < n_layers):
        return Site(match[1], int(match[2]))
    last = "L" if n_layers is None else n_layers - 1
    there_are = ", ".join(f"{kind}.0 to {kind}.{last}" for kind in KINDS)
    raise InputError(f"expected a site of the model, one of {EMBED}, {there_are}, got {text!r}")


def split_model(site: str) -> tuple[str | None, str]:
    """`"chat/resid_post.2"` -> `("chat", "resid_post.2")`; None instead of the name for a site of the only or the first model."""
    match = re.fullmatch(rf"({MODEL})/(.*)", site)
    return (match[1], match[2]) if match else (None, site)


def checked_site(text: str) -> str:
    """The text, if it is a site of the only, the first or a second model; raises `InputError` as `parse_site` does."""
    name, own = split_model(text)
    return in_model(name, str(parse_site(own)))


def in_model(name: str | None, site: str) -> str:
    """The inverse of `split_model`."""
    return site if name is None else f"{name}/{site}"
