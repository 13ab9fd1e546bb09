"""Sites under the names of modules of Hugging Face's models, which some tools write into their files: "layers.5.mlp"."""

import re

ENDS = {
    "": ("resid_pre", "resid_post"),
    "mlp": ("mlp_in", "mlp_out"),
    **dict.fromkeys(("self_attn", "attn", "attention", "attn.attention"), ("attn_in", "attn_out")),
}
# families whose sublayers are followed by their own norm: what such a module puts out is not what is added to the stream
NORM_BEHIND = re.compile(r"gemma-?[234]|olmo-?[23]|glm-?4", re.IGNORECASE)


def ends_of_module(module: str, model: str | None) -> tuple[str | None, str | None]:
    """Our names of a module's input and output; None for an end that is not a site. `model` is its name on the hub."""
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(0|[1-9][0-9]*)(?:\.(.+))?", module)
    kind = match and (match[2] or "")
    if not match or kind not in ENDS:
        return None, None
    into, out = (f"{end}.{match[1]}" for end in ENDS[kind])
    return into, None if kind and model is not None and NORM_BEHIND.search(model) else out
