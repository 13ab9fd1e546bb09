"""cfg.json of a folder of SAELens, read strictly: settings that change the function, or the site that it reads, are understood or
refused by name.

Since version 6 cfg.json is short, with facts on model and training under `metadata`; before, all keys stood side by side, in version 2 the
whole run's settings. d model width · f features · o width of what is written
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import NotRequired, TypedDict

from sae.dictionaries.formats.saelens.published import settings_of
from sae.dictionaries.formats.transformer_lens import FOLDED, HOOK_NAMES, site_of_hook, tell_folded
from sae.dictionaries.frames import Frame
from sae.disk.reading import read_json
from sae.errors import InputError
from sae.model.sites import checked_site, parse_site

CFG = "cfg.json"


class Architecture(NamedTuple):
    """SAELens' name of a kind of dictionary, or our name if SAELens does not have it."""

    tensors: tuple[str, ...] = ("b_enc",)
    """in addition to W_enc, W_dec and b_dec"""
    transcoder: bool = False
    """it writes at another hook than it reads"""
    has_k: bool = False
    """it keeps k activations of each token"""

    @property
    def compares(self) -> bool:
        """Whether it chooses activations by comparing them with those of other features, for which decoder norms may count."""
        return self.has_k or "topk_threshold" in self.tensors


ARCHITECTURES = {
    "standard": Architecture(),
    "jumprelu": Architecture(("b_enc", "threshold")),
    "topk": Architecture(has_k=True),
    "abstopk": Architecture(has_k=True),
    "gated": Architecture(("b_gate", "b_mag", "r_mag")),
    "transcoder": Architecture(transcoder=True),
    "skip_transcoder": Architecture(("b_enc", "W_skip"), transcoder=True),
    "jumprelu_transcoder": Architecture(("b_enc", "threshold"), transcoder=True),
    "jumprelu_skip_transcoder": Architecture(("b_enc", "threshold", "W_skip"), transcoder=True),
    # in training alone; for inference SAELens saves them as jumprelu with the one threshold that they learned
    "batchtopk": Architecture(("b_enc", "topk_threshold")),
    "matryoshka_batchtopk": Architecture(("b_enc", "topk_threshold")),
}
KINDS = ARCHITECTURES | {name: Architecture(has_k=True) for name in ("bare_topk", "groupmax")}
"""including those that SAELens does not have: two gates, transcoders that keep k, autoencoders with a skip matrix"""
for _gate in ("topk", "abstopk", "bare_topk", "groupmax"):
    KINDS[f"{_gate}_transcoder"] = Architecture(transcoder=True, has_k=True)
    KINDS[f"{_gate}_skip_transcoder"] = Architecture(("b_enc", "W_skip"), transcoder=True, has_k=True)
    KINDS[f"{_gate}_skip"] = Architecture(("b_enc", "W_skip"), has_k=True)
KINDS |= {"standard_skip": Architecture(("b_enc", "W_skip")), "jumprelu_skip": Architecture(("b_enc", "threshold", "W_skip"))}
REFUSED = {
    "temporal": "which attends to earlier tokens of the text: here a token is encoded by itself",
    "matching_pursuit": "which chooses features one after another by what is left of the token: here a gate chooses among pre-activations",
}
ESTIMATED = ("expected_average_only_in", "covariance_whitening")
"""normalisations with numbers that SAELens estimates when training begins and folds into the weights when it ends"""

OLDER_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}

# Values of each key that are understood; their meaning is in the functions below
KNOWN: dict[str, tuple[Any, ...]] = {
    "architecture": tuple(KINDS),
    "activation_fn": ("relu", "topk", None),
    "normalize_activations": ("none", "constant_norm_rescale", "layer_norm", *ESTIMATED, None),
    "reshape_activations": ("none", "hook_z", None),
    "rescale_acts_by_decoder_norm": (False, True, None),
    "use_error_term": (False, None),
    "apply_b_dec_to_input": (True, False),
    "finetuning_scaling_factor": (True, False, None),  # what it multiplies by is among the weights
    "hook_head_index": (None,),
    "hook_head_index_out": (None,),
    "dtype": tuple(f"{prefix}{name}" for name in ("float32", "float64", "float16", "bfloat16") for prefix in ("", "torch.")),
}
DECIDED = {*KNOWN, "d_in", "d_sae", "d_out", "k", "activation_fn_kwargs", "hook_name_out", "hook_layer_out"}

# Facts on text, training and machine, on which the function does not depend
FACTS = {
    *("d_in", "d_sae", "device", "metadata"),
    *("model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_layer", "hf_hook_name", "neuronpedia_id"),
    *("context_size", "prepend_bos", "exclude_special_tokens", "seqpos_slice", "dataset_path", "dataset_trust_remote_code"),
    *("sae_lens_version", "sae_lens_training_version"),
    *("l1_coefficient", "lp_norm", "l1_warm_up_steps", "decoder_init_norm", "noise_scale", "mse_loss_normalization", "use_ghost_grads"),
    *("normalize_sae_decoder", "decoder_orthogonal_init", "decoder_heuristic_init", "init_encoder_as_decoder_transpose"),
    *("aux_loss_coefficient", "use_sparse_activations", "topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss"),
    *("l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "target_l0", "jumprelu_init_threshold", "jumprelu_bandwidth"),
    *("jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale", "jumprelu_ste_to_input"),
}

# TransformerLens' arguments that leave the activations of our sites as the model of Hugging Face has them
SAME_ACTIVATIONS = {"center_unembed", "dtype", "torch_dtype", "device", "n_devices", "trust_remote_code"}
HEADS = ("q", "k", "v", "head_out")  # which TransformerLens gives head by head, and SAELens puts side by side under the name hook_z
SAME_EXCEPT_HEADS = {FOLDED, "refactor_factored_attn_matrices"}
CENTRED = "center_writing_weights"  # everything that is added to the stream loses its mean over the width
CENTRED_KINDS = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


class Cfg(TypedDict):
    """cfg.json as far as its form is fixed; the meaning of the keys is checked below."""

    metadata: NotRequired[dict[str, Any] | None]


class Settings(NamedTuple):
    """The understood content of cfg.json."""

    architecture: str
    widths: dict[str, int]
    """d_in, d_sae and d_out"""
    k: int | None
    frame: Frame | None
    estimated: str | None
    """the one of `ESTIMATED` that was in use"""
    subtracts_b_dec: bool
    rescales: bool
    """it chooses by activation times decoder norm"""
    finetuned: bool
    """each activation is decoded times its own scaling_factor"""
    dtype: str | None
    """to compute in, for example "float32"; by default that of the weights"""
    metadata: dict[str, Any]
    """every other fact; our names of the hooks under "site" and, of a transcoder, "site_out" """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that must be there."""
        d, f, o = (self.widths[name] for name in ("d_in", "d_sae", "d_out"))
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, f), "W_dec": (f, o), "b_dec": (o,)}
        others = {"W_skip": (o, d), "topk_threshold": ()}
        return shapes | {name: others.get(name, (f,)) for name in KINDS[self.architecture].tensors}


def read_settings(folder: Path) -> Settings:
    cfg = read_json(folder / CFG, "a dictionary's cfg.json", Cfg)
    values = merge(folder, cfg)
    require_known(folder, cfg, values)
    name = "topk" if values.get("activation_fn") == "topk" else values.get("architecture", "standard")
    kind = KINDS[name]
    site, site_out = find_site(folder, values, ""), find_site(folder, values, "_out")
    if kind.transcoder == (site_out is None):
        raise InputError(
            f"the dictionary in {folder} has architecture {name!r} and hook_name_out {values.get('hook_name_out')!r}; a transcoder, "
            "and no other, names a hook to write at"
        )
    subtracts = bool(values.get("apply_b_dec_to_input", not kind.transcoder))
    if kind.transcoder and subtracts:
        raise InputError(f"the dictionary in {folder} has apply_b_dec_to_input true, but a transcoder's b_dec belongs to its output")
    if values.get("rescale_acts_by_decoder_norm") and not kind.compares:
        raise InputError(f"the dictionary in {folder} has rescale_acts_by_decoder_norm, which says nothing for {name!r}")
    normalised = values.get("normalize_activations")
    if kind.transcoder and normalised in ESTIMATED:
        raise InputError(
            f"the dictionary in {folder} has normalize_activations {normalised!r}, which does not tell by what a transcoder's output is "
            "divided; fold both factors into the weights first"
        )
    sites = {key: value for key, value in (("site", site), ("site_out", site_out)) if value}
    return Settings(
        name,
        find_widths(folder, values, kind),
        find_k(folder, values, kind),
        find_frame(folder, values, site, kind),
        normalised if normalised in ESTIMATED else None,
        subtracts,
        bool(values.get("rescale_acts_by_decoder_norm")),
        bool(values.get("finetuning_scaling_factor")),
        values["dtype"].removeprefix("torch.") if "dtype" in values else None,
        {key: value for key, value in values.items() if key not in DECIDED - {"hook_name_out"} and key != "device"} | sites,
    )


def merge(folder: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """All keys together under their newest names. Raises `InputError` if two places contradict each other."""
    values: dict[str, Any] = {}
    metadata = cfg.get("metadata") or {}
    for key, value in [*cfg.items(), *metadata.items()]:
        key = OLDER_NAMES.get(key, key)
        if key == "metadata":
            continue
        if key in values and values[key] != value:
            raise InputError(f"{folder / CFG} says two things of {key}, {values[key]!r} and {value!r}; leave the right one")
        values[key] = value
    if isinstance(values.get("normalize_activations"), bool):  # versions 2 to 5
        values["normalize_activations"] = ESTIMATED[0] if values["normalize_activations"] else "none"
    for key, value in settings_of(folder).items():
        if values.get(key) != value:
            print(f"SAELens' list of dictionaries states for {folder} {key} {value!r}, in place of what its {CFG} says", file=sys.stderr)
        values[key] = value
    return values


def require_known(folder: Path, cfg: dict[str, Any], values: dict[str, Any]) -> None:
    """Raises `InputError` naming a key whose value is not understood, or that is unknown.

    The many settings of an old run, with which cfg.json is open-ended, are named on stderr instead.
    """
    name = values.get("architecture")
    if isinstance(name, str) and name in REFUSED:
        raise InputError(f"the dictionary in {folder} has architecture {name!r}, {REFUSED[name]}; it cannot be read")
    for key, known in KNOWN.items():
        value = values.get(key, known[0])
        if not any(value == one and isinstance(value, type(one)) for one in known):
            expected = " or ".join("nothing" if one is None else repr(one) for one in known)
            raise InputError(f"the dictionary in {folder} has {key} {value!r}, which is not understood; expected {expected}")
    unknown = sorted({OLDER_NAMES.get(key, key) for key in cfg} - DECIDED - FACTS)
    if unknown and "metadata" in cfg:
        raise InputError(
            f"{folder / CFG} has {', '.join(unknown)}, which may change what the dictionary computes and is not supported here"
        )
    if unknown:
        print(f"{folder / CFG} has settings of an old training run, taken as mere facts: {', '.join(unknown)}", file=sys.stderr)


def find_widths(folder: Path, values: dict[str, Any], kind: Architecture) -> dict[str, int]:
    missing = [key for key in ("d_in", "d_sae", *(("d_out",) if kind.transcoder else ())) if key not in values]
    if missing:
        raise InputError(f"the dictionary in {folder} lacks {', '.join(missing)} in {CFG}; copy or train it again")
    if not kind.transcoder and values.get("d_out", values["d_in"]) != values["d_in"]:
        raise InputError(f"the dictionary in {folder} has d_out {values['d_out']!r} beside d_in {values['d_in']!r}, but is no transcoder")
    widths = {"d_in": values["d_in"], "d_sae": values["d_sae"], "d_out": values.get("d_out", values["d_in"])}
    for key, width in widths.items():
        if type(width) is not int or width < 1:
            raise InputError(f"{folder / CFG} has {key} {width!r}, where a whole number of at least 1 is expected")
    return widths


def find_k(folder: Path, values: dict[str, Any], kind: Architecture) -> int | None:
    """How many features a TopK keeps; the key was renamed in version 6.

    The k of the BatchTopKs is a mean, and a fact of training.
    """
    if kind.compares and not kind.has_k:
        return None
    arguments = values.get("activation_fn_kwargs") or {}
    if not isinstance(arguments, dict) or set(arguments) - {"k"}:
        raise InputError(f"the dictionary in {folder} has activation_fn_kwargs {arguments!r}, where at most k is expected")
    said = {value for value in (values.get("k"), arguments.get("k")) if value is not None}
    if not kind.has_k and not said:
        return None
    if not kind.has_k or len(said) != 1 or type(k := said.pop()) is not int or not 1 <= k <= values["d_sae"]:
        raise InputError(
            f"the dictionary in {folder} has k {values.get('k', arguments.get('k'))!r} and architecture "
            f"{values.get('architecture', 'standard')!r}; a TopK, and no other, has one k from 1 to d_sae"
        )
    return k


def find_frame(folder: Path, values: dict[str, Any], site: str | list[str] | None, kind: Architecture) -> Frame | None:
    """Raises `InputError` where the model's weights were changed on loading so that the site has values that cannot be made here."""
    at = str(site[0] if isinstance(site, list) else site or "").partition(".")[0]
    if values.get("reshape_activations") == "hook_z" and site is not None and at not in HEADS:
        raise InputError(f"the dictionary in {folder} has reshape_activations 'hook_z', but reads {site}; leave the right one")
    same = SAME_ACTIVATIONS | (set() if at in HEADS else SAME_EXCEPT_HEADS) | (set() if at in ("attn_in", "mlp_in") else {"fold_ln"})
    given = values.get("model_from_pretrained_kwargs") or {}
    if not isinstance(given, dict):
        raise InputError(f"{folder / CFG} has model_from_pretrained_kwargs {given!r}, where an object is expected")
    changing = {key for key, value in given.items() if key not in same and value not in (None, False)}
    if FOLDED in changing and at == "head_out" and not kind.transcoder:
        changing.remove(FOLDED)
        tell_folded(f"the dictionary in {folder}", site)
    normalised: Any = values.get("normalize_activations") or "none"
    normalised = "none" if normalised in ESTIMATED else normalised
    centred = CENTRED in changing and at in CENTRED_KINDS and not kind.transcoder
    if changing - ({CENTRED} if centred or at in HEADS else set()) or (centred and normalised == "constant_norm_rescale"):
        raise InputError(
            f"the dictionary in {folder} was trained on a model loaded with model_from_pretrained_kwargs {', '.join(sorted(changing))}, "
            "whose activations are not those of the model as it is; such a dictionary cannot be read"
        )
    if normalised != "none":  # LayerNorm takes the mean off anyway
        return Frame(normalised, restores=not kind.transcoder)
    return Frame("centred") if centred else None


def find_site(folder: Path, values: dict[str, Any], out: str) -> str | list[str] | None:
    """Our name of its input (`out` "") or output ("_out") site, or names of several; None if the folder does not state it.

    Raises `InputError` for a hook or site that is not known here.
    """
    hook, site, layer = (values.get(f"{name}{out}") for name in ("hook_name", "site", "hook_layer"))
    if isinstance(site, list):
        return [one and checked_site(str(one)) for one in site]
    if site is not None:
        site = str(parse_site(str(site)))
    if hook is None:
        return site
    found = site_of_hook(str(hook).replace("{layer}", str(layer)))  # as in SAELens 1
    if found is None:
        raise InputError(
            f"the dictionary in {folder} {'writes' if out else 'reads'} the hook {hook!r}, which is none of the sites known here: "
            + ", ".join(pattern.format("L") for pattern in HOOK_NAMES.values())
        )
    for name, other in (("site", site), ("hook_layer", layer)):
        if other not in (None, found, max(parse_site(found).layer, 0)):
            raise InputError(f"the dictionary in {folder} says hook {hook!r} and {name} {other!r}, which differ; leave the right one")
    return found
