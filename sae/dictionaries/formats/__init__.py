"""Formats of dictionaries on disk, one row each. `load` finds the row of a folder or file; `saelens/` is the one that is written too.

`trainers/` has the formats of training programs, `releases/` published dictionaries with special layouts, tensors.py shared code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sae.dictionaries.formats.releases import gemma_scope, goodfire, kissane, kissane_attention, learned_dicts, llama_scope, qwen_scope
from sae.dictionaries.formats.saelens import files as saelens
from sae.dictionaries.formats.tensors import Device, has
from sae.dictionaries.formats.trainers import (
    bussmann,
    circuit_tracer,
    crosscoder_learning,
    dictionary_learning,
    llamascopium,
    openai,
    sparsify,
)
from sae.dictionaries.parts import Layers, Parts
from sae.errors import InputError

SHOWN = 12
"""files named in an error"""


class Format(NamedTuple):
    """Also a row of the table in docs/dictionaries.md, which scripts/formats_table.py writes."""

    name: str
    files: str
    """the files by which it is recognised"""
    recognises: Callable[[Path], bool]
    """whether this folder or file has the format, by names of files and their contents. May raise `InputError` for a damaged one"""
    load: Callable[[Path, Device], Parts | Layers]
    """reads it. Raises `InputError` for settings that change the function and are not understood"""
    opens: str
    """the kinds that open"""
    note: str
    """what users should know"""
    proved: str = "formula"
    """what its tests compare it with"""


FORMATS = (
    Format(
        "SAELens",
        f"{saelens.CFG} + {saelens.WEIGHTS}",
        saelens.recognises,
        saelens.load,
        "all that it saves, except temporal and matching_pursuit",
        "Versions 2 to 6 and checkpoints, see below.",
        "formula; SAELens itself, both ways",
    ),
    Format(
        "set of SAELens folders",
        f"layer_0/{saelens.WEIGHTS} and so on",
        has(f"layer_*/{saelens.WEIGHTS}"),
        saelens.load_set,
        "a set of any of these",
        "`sae import-dictionary` writes it.",
    ),
    Format(
        "Gemma Scope",
        gemma_scope.PARAMS_1,
        gemma_scope.recognises_1,
        gemma_scope.load_1,
        "JumpReLU: res, mlp, att, transcoders, embedding",
        "Only the names of the folders state site and model: keep them in a local copy. Dictionaries of the embedding read resid_pre.0.",
    ),
    Format(
        "Gemma Scope 2",
        gemma_scope.PARAMS_2,
        gemma_scope.recognises_2,
        gemma_scope.load_2,
        "JumpReLU: resid_post, attn_out, mlp_out, transcoders, affine or not",
        "Without config.json, the names of the folders state site and model.",
    ),
    Format(
        "Gemma Scope 2, several layers",
        gemma_scope.LAYER_FILES,
        has(gemma_scope.LAYER_FILES),
        gemma_scope.load_layers,
        "cross-layer transcoders, affine or not; weakly causal crosscoders",
        "A set.",
    ),
    Format(
        "Llama Scope",
        llama_scope.FILES,
        llama_scope.recognises,
        llama_scope.load,
        "TopK used with one threshold; ReLU, JumpReLU, TopK; autoencoders and transcoders",
        "As in its authors' loader, with the decoder's norm before the threshold, which SAELens omits. The first token fits badly.",
    ),
    Format(
        "Llamascopium",
        llamascopium.FILES,
        llamascopium.recognises,
        llamascopium.load,
        "relu, jumprelu, topk, batchtopk; autoencoders and transcoders, also those of Llama Scope for R1-Distill",
        "A feature's activation times its decoder norm is compared with the threshold. A batchtopk keeps k features of each token, and a "
        "message says so. Crosscoders, CLTs, Lorsa and MOLT are refused.",
    ),
    Format(
        "Qwen-Scope",
        qwen_scope.FILES,
        qwen_scope.recognises,
        qwen_scope.load,
        "TopK without ReLU",
        "The folder is a set of layers; its name, SAE-Res-MODEL-W…K-L0_K, states the model and how many features are kept: keep it in "
        "a local copy.",
    ),
    Format(
        "Goodfire, qresearch",
        goodfire.FILES,
        goodfire.recognises,
        goodfire.load,
        "ReLU of Llama and R1-Distill; tied BatchTopK of DeepSeek-R1",
        "The name of the file states site and model. For DeepSeek-R1, the folder math or logic states how many features each token keeps.",
    ),
    Format(
        "circuit-tracer",
        "config.yaml + layer_0.safetensors or W_enc_0 and W_dec_0",
        circuit_tracer.recognises,
        circuit_tracer.load,
        "sets of transcoders with ReLU, JumpReLU or TopK, with skip; cross-layer transcoders; lists of files on the hub",
        "Its TopK has no ReLU. Thresholds below 0 are refused.",
    ),
    Format(
        "sparsify",
        sparsify.FILES,
        sparsify.recognises,
        sparsify.load,
        "topk, groupmax and signed; autoencoders, transcoders, with skip",
        "The run's folder is a set of layers; with several seeds, name one folder. A transcoder subtracts no bias from its input, "
        "except those trained before February 2025.",
        "formula; files that sparsify wrote, with its outputs",
    ),
    Format(
        "dictionary_learning",
        dictionary_learning.FILES,
        dictionary_learning.recognises,
        dictionary_learning.load,
        "the seven classes of all its trainers, checkpoints, backups",
        "The decoder rows of an AutoEncoder get length 1, as in the tool's own loader. A BatchTopK without a threshold keeps k "
        "features of each token, and a message says so. eval_results.json is kept as the authors' measurement.",
        "formula; files that dictionary_learning trained, with its outputs",
    ),
    Format(
        "crosscoder_learning",
        crosscoder_learning.FILES,
        crosscoder_learning.recognises,
        crosscoder_learning.load,
        "CrossCoder, BatchTopKCrossCoder, its BatchTopKSAE, with or without normaliser",
        "A feature of a decoupled crosscoder has a threshold at each place, so it becomes one feature for each place: number p · F + i.",
    ),
    Format(
        "crosscoders of Kissane and Nanda",
        kissane.FILES,
        kissane.recognises,
        kissane.load,
        "ReLU",
        "The files lack the factors by which training multiplied the activations; `dictionary.folded(factors)` applies them.",
    ),
    Format(
        "attention SAEs of Kissane",
        kissane_attention.FILES,
        kissane_attention.recognises,
        kissane_attention.load,
        "ReLU",
        "They read the heads' outputs without the contribution of the values' bias, as in TransformerLens; "
        "`sae check-dictionary --write` writes one for the unchanged model.",
    ),
    Format(
        "BatchTopK and Matryoshka of Bussmann",
        bussmann.FILES,
        bussmann.recognises,
        bussmann.load,
        "vanilla, topk, batchtopk, jumprelu, global-matryoshka-topk",
        "TopK and BatchTopK do not use b_enc.",
    ),
    Format(
        "learned_dicts of Cunningham and others",
        learned_dicts.FILES,
        learned_dicts.recognises,
        learned_dicts.load,
        "TiedSAE, UntiedSAE",
        "Only the attributes of its objects are read, and no code is run; other classes are refused. A file holds a whole sweep: name "
        "one, as learned_dicts.pt/3. Folder names like tied_residual_l2_r4 state the site; TransformerLens' stream there has no mean.",
    ),
    Format(
        "OpenAI",
        openai.FILES,
        openai.recognises,
        openai.load,
        "autoencoders of GPT-2: ReLU (v1, v4), TopK with layer norm (v5)",
        "The site is taken from the path gpt2-small/LOCATION/autoencoders/LAYER.pt.",
    ),
)


def format_of(path: Path) -> Format:
    """The row of a folder or file. Raises `InputError` if none or several rows recognise it."""
    if not path.exists():
        raise InputError(f"expected a dictionary in {path}, which does not exist; check its name")
    found, damage = [], None
    for row in FORMATS:
        try:
            found += [row] if row.recognises(path) else []
        except InputError as error:
            damage = damage or error
    if len(found) == 1:
        return found[0]
    if damage is not None and not found:
        raise damage
    if found:
        names = " and ".join(f"{row.name} ({row.files})" for row in found)
        raise InputError(f"expected one dictionary in {path}, found files of {names}; move one of them elsewhere")
    files = sorted(one.name + "/" * one.is_dir() for one in path.iterdir()) if path.is_dir() else [path.name]
    there = ", ".join(files[:SHOWN]) + (f" and {len(files) - SHOWN} more" if len(files) > SHOWN else "")
    known = "; ".join(f"{row.name}: {row.files}" for row in FORMATS)
    raise InputError(f"expected a dictionary in {path}, found no known format ({known}), but {there or 'nothing'}; check its name")


def load(path: Path, device: Device = "cpu") -> Parts | Layers:
    """The parts of a dictionary, or of each dictionary of a set, in a folder or file. Raises `InputError` if it has none of the formats."""
    return format_of(path).load(path, device)
