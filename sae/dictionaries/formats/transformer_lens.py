"""TransformerLens' names of our sites, which SAELens and its readers write into their files."""

import re

HOOK_NAMES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "head_out": "blocks.{}.attn.hook_z",
}


def site_of_hook(hook: str) -> str | None:
    """Our name of one of TransformerLens' hooks; None for a hook that is none of our sites."""
    for kind, pattern in HOOK_NAMES.items():
        before, after = map(re.escape, pattern.split("{}"))
        if match := re.fullmatch(f"{before}(0|[1-9][0-9]*){after}", hook):
            return f"{kind}.{match[1]}"
    return None


def hook_of_site(site: str | None) -> str | None:
    kind, _, layer = (site or "").partition(".")
    return HOOK_NAMES[kind].format(layer) if kind in HOOK_NAMES else None
