"""TransformerLens' names of our sites, which SAELens and its readers write into their files."""

import re
import sys

from sae.model.sites import EMBED

HOOK_NAMES = {
    EMBED: "hook_embed",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "attn_in": "blocks.{}.attn.hook_in",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "head_out": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_in_nogain": "blocks.{}.ln2.hook_normalized",
    "mlp_in": "blocks.{}.mlp.hook_in",
    "mlp_act": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}
# Other names of the same values: hook_mlp_in is a copy of the stream before the norm, hook_in and hook_out are TransformerBridge's
ALIASES = {
    "blocks.{}.hook_mlp_in": "resid_mid",
    "blocks.{}.hook_in": "resid_pre",
    "blocks.{}.hook_out": "resid_post",
}


FOLDED = "fold_value_biases"  # what the bias of the values adds to the heads' outputs is in a bias after them


def tell_folded(where: object, site: object) -> None:
    """Prints on stderr that a dictionary reads the heads' outputs without a part of them that only the model has."""
    print(
        f"{where} takes {site} without what the bias of the values adds to it, as TransformerLens has it ({FOLDED}); where the model has "
        "such a bias, `sae check-dictionary --write DIR` writes the dictionary for the model as it is",
        file=sys.stderr,
    )


def site_of_hook(hook: str) -> str | None:
    """Our name of one of TransformerLens' hooks; None for a hook that is not one of our sites."""
    for kind, pattern in (*HOOK_NAMES.items(), *((kind, pattern) for pattern, kind in ALIASES.items())):
        if pattern == hook:
            return kind
        before, _, after = pattern.partition("{}")
        if after and (match := re.fullmatch(f"{re.escape(before)}(0|[1-9][0-9]*){re.escape(after)}", hook)):
            return f"{kind}.{match[1]}"
    return None


def hook_of_site(site: str | None) -> str | None:
    kind, _, layer = (site or "").partition(".")
    return HOOK_NAMES[kind].format(layer) if kind in HOOK_NAMES else None
