"""Index every feature of a dictionary in one pass over a cache.

b rows of a chunk · d model width · f features · n tokens of the cache · s sequences

The folder holds `index.json` and, as safetensors, `columns` (statistics and logit lens of every feature), `records` (all non-zero
activations, feature after feature: see csc.py), `details` (what a reader is shown of each feature: see examples.py and neighbours.py),
`token_features` (features by the token they fire on), `sums` (from which indexes of other text are merged: see contribution.py) and
`tokens` (the text, so that neither cache nor model is needed to browse).
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sae.device import device_named
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.parts import Port
from sae.dictionaries.source import sampled_crc32, weights_crc32
from sae.disk.arrays import ANSWERS, EXPLANATIONS, create, open_arrays, write_arrays
from sae.disk.checksum import crc32
from sae.disk.folders import fresh_folder
from sae.disk.mapped import is_mapped
from sae.disk.places import require_folder
from sae.disk.remote import Place
from sae.disk.writing import write_json
from sae.encoding import Method
from sae.errors import InputError
from sae.features.index import examples, neighbours
from sae.features.index.contribution import contributions
from sae.features.index.csc import BLOCK_ENTRIES, MAX_FEATURES, RUN_ENTRIES, merge, statistics
from sae.features.index.lens import folded_unembedding, into_residual, logit_lens
from sae.features.index.opening import CHECKED, FORMAT_VERSION, details_layout
from sae.features.index.parallel import in_order
from sae.features.index.spooling import Spooled, spool_activations
from sae.pieces import Pieces, pieces
from sae.processes import Processes
from sae.text_input import text_list

if TYPE_CHECKING:
    from sae.activations.cache import ActivationCache
    from sae.model.language_model import LanguageModel

MOST_OPERATIONS = 10**15  # for all features together, on a CPU: about four hours on two cores
TEXT = ("ids", "sequence_starts", "sequence_document", "document_label", "sequence_split")


@dataclass(kw_only=True)
class IndexConfig:
    cache: Place
    """Folder or URL of an activation cache that `sae cache` wrote."""
    dictionary: str
    """Folder, file or hub name of the dictionary."""
    out: Path
    """Folder for the index; an existing index in it is replaced."""
    tokens: int | None = None
    """Index at most this many tokens: whole sequences, drawn at random. Default: all."""
    splits: tuple[str, ...] = ("train", "held_out")
    """Splits of the cache to index."""
    part: str | None = None
    """Index only part i of n of these tokens, written i/n, for example 1/4; `sae merge` joins the parts."""
    model: str | None = None
    """Model for tokenizer and logit lens, by hub name, folder or GGUF file. Default: the one the cache names."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    encoder: Method | Literal["auto"] = "auto"
    """How pre-activations are computed; auto measures which is fastest. The choice affects the last digits: name one to repeat an index bit
    for bit."""
    verify: bool = False
    """First read the whole site in the cache to compare every checksum. By default only those of token files up to 32 MB are compared."""


def build_index(config: IndexConfig) -> Path:
    """Builds the folder completely or not at all, and returns its path.

    Called in every process that torchrun started, they share the encoding, and the index has the same bytes as that of one; when one of
    them fails, so do the others, with SystemExit. Killed and started again, with any number of processes, it continues with the pieces that
    were finished (see sae/pieces.py), one for each of the cache's shards.

    Memory of a process: on a CPU up to four chunks of activations (64 MB each; one on CUDA), one run or block of 8M entries (about 200 MB)
    or the largest feature if that is more, and the tokens. Raises `InputError` when cache and dictionary do not belong together.
    """
    from sae.activations.joined import cache_of
    from sae.model.language_model import LanguageModel

    require_folder(config.out)
    processes = Processes.from_environment()
    with processes.together():
        dictionary = Dictionary.load(config.dictionary, device_named(processes.device(config.device)))
        cache = cache_of(config.cache, dictionary, named=config.model is not None, verify=config.verify and processes.leads)
        if dictionary.d_sae > MAX_FEATURES:
            raise InputError(f"expected at most {MAX_FEATURES:,} features, but the dictionary has {dictionary.d_sae:,}")
        known = checksum(config.dictionary, dictionary)
        if not processes.leads:
            with pieces(processes, config.out, decisive(config, cache, known)) as made:
                spool(made, config, dictionary, cache)
            return config.out
        model = LanguageModel.load(config.model or cache.model_name(), device="cpu")
        cache.require_model(model)
        with pieces(processes, config.out, decisive(config, cache, known)) as made, replacing_index(config.out) as folder:
            spooled = spool(made, config, dictionary, cache)
            write_index(folder, config, dictionary, cache, model, known, spooled)
    active = spooled.entries / spooled.scanned.sum()
    print(f"indexed {dictionary.d_sae:,} features in {config.out}, {active:.1f} active per token")
    return config.out


def spool(made: Pieces, config: IndexConfig, dictionary: Dictionary, cache: "ActivationCache") -> Spooled:
    return spool_activations(made, dictionary, cache, choose_tokens(cache.tokens, cache, config), config.splits, config.encoder)


def decisive(config: IndexConfig, cache: "ActivationCache", known: dict[str, str]) -> dict[str, Any]:
    """The settings that decide the spooled activations."""
    from sae.activations.files.manifest import manifest_crc32

    chosen = {name: getattr(config, name) for name in ("tokens", "splits", "part", "encoder")}
    return {"format_version": FORMAT_VERSION, "cache": manifest_crc32(cache.manifest), **known, **chosen}


@contextmanager
def replacing_index(out: Path) -> Iterator[Path]:
    """`fresh_folder`, with a message if explanations are removed with the older index."""
    explained = (out / EXPLANATIONS).exists()
    with fresh_folder(out, "index.json", "index", keep=ANSWERS) as folder:  # somebody paid for a model's answers
        yield folder
    if explained:
        print(
            "the explanations of the older index went with it, since their scores are of its text: `sae explain` makes them again, "
            "and asks a model only for answers it has not given on this text"
        )


def write_index(
    folder: Path,
    config: IndexConfig,
    dictionary: Dictionary,
    cache: "ActivationCache",
    model: "LanguageModel",
    known: dict[str, str],
    spooled: Spooled,
) -> None:
    """Writes the files of an index into the empty `folder`; `known`: the result of `checksum`."""
    from sae.model.vocabulary import vocabulary

    tokens = cache.tokens
    text = {name: np.asarray(getattr(tokens, name)) for name in TEXT}
    columns, details = derive_columns(folder, spooled.runs, dictionary.d_sae, text, signed=dictionary.gate.signed)
    columns["decoder_norm"] = dictionary.norms().float().cpu().numpy()  # host sync
    alike = too_long(2 * dictionary.d_sae**2 * dictionary.d_out, dictionary)
    if not alike:
        neighbours.cosine_neighbours(dictionary.W_dec_fo, details["neighbour_ids"], details["neighbour_cosines"])
    found, lens = lens_of(dictionary, cache.own_site, model)
    if found:
        details["lens_counts"][:] = found.pop("lens_counts")
        columns |= found
    vocab = vocabulary(model.tokenizer, int(tokens.ids.max()) + 1)
    info: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dictionary": str(config.dictionary),
        **known,
        "cache": str(config.cache),
        "model": cache.model,
        "site": sites_of(dictionary.reads) or cache.own_site,
        **({"site_out": sites_of(dictionary.writes), "d_out": dictionary.d_out} if dictionary.is_transcoder else {}),
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "splits": list(config.splits),
        "encoder": spooled.encoder,
        "activations": spooled.entries,
        "activations_cut_to_65504": spooled.clipped,
        "label_names": list(tokens.label_names),
        "logit_lens": lens,
        **({"cosine_neighbours": f"none: {alike}"} if alike else {}),
    }
    for what, none in (("logit lens", lens), ("neighbours by cosine", info.get("cosine_neighbours", ""))):
        if none.startswith("none: "):
            print(f"the index has no {what}: {none[6:]}", file=sys.stderr)
    text |= {
        "scanned": spooled.scanned,
        "piece_bytes": np.frombuffer(b"".join(vocab.pieces), np.uint8),
        "piece_lengths": np.array([len(p) for p in vocab.pieces], np.int32),
        "piece_special": vocab.special,
    }
    write_final_files(folder, info, columns, details, spooled.sums, text)


def sites_of(ports: tuple[Port, ...]) -> str | list[str | None] | None:
    """The name of the only site, or a list of several."""
    return ports[0].site if len(ports) == 1 else [port.site for port in ports]


def checksum(source: str, dictionary: Dictionary) -> dict[str, str]:
    """Entries of index.json that identify the dictionary."""
    parts = dictionary.parts()
    if is_mapped(parts.W_dec_fo):  # so that nobody who opens one feature has to read all
        return {"dictionary_crc32": sampled_crc32(parts), "dictionary_crc32_of": "samples"}
    return {"dictionary_crc32": weights_crc32(source, [parts])}


def too_long(operations: int, dictionary: Dictionary) -> str:
    """Why a product over all features is left out, or an empty text: too many operations keep a CPU busy for hours."""
    if dictionary.W_dec_fo.is_cuda or operations <= MOST_OPERATIONS:
        return ""
    return f"for {dictionary.d_sae:,} features it takes {operations:.0e} operations, which is left to a GPU (--device cuda)"


def lens_of(dictionary: Dictionary, site: str, model: "LanguageModel") -> tuple[dict[str, np.ndarray], str]:
    """The result of `logit_lens`, empty if there is none, and a sentence that says what it is or why there is none."""
    if len(dictionary.writes) > 1:
        return {}, "none: the dictionary writes at several sites"
    into = partial(into_residual, model, dictionary.site_out or site)
    row_1o = dictionary.rows([0])
    try:
        projected = into(row_1o) is not row_1o
    except InputError as error:
        return {}, f"none: {error}"
    W_U_vd, lens = folded_unembedding(model)
    W_U_vd = W_U_vd[: len(model.tokenizer)]  # rows beyond are padding that nobody can read
    if none := too_long(2 * dictionary.d_sae * W_U_vd.numel(), dictionary):
        return {}, f"none: {none}"
    if dictionary.features_at_once < dictionary.d_sae:
        found = logit_lens(dictionary.W_dec_fo, W_U_vd, into=into)
    else:
        found = logit_lens(into(dictionary.W_dec_fo), W_U_vd)
    return found, lens + ("; W_dec[j] is first taken through the output projection" if projected else "")


def derive_columns(
    folder: Path, runs: list[Path], d_sae: int, text: dict[str, np.ndarray], shifts: list[int] | None = None, signed: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Merges the runs into records.safetensors and computes everything that depends only on the activations: columns, and the rows of
    details."""
    shown = examples.Text.of(text["ids"], text["sequence_starts"], text["sequence_document"])
    details = create(folder / "details.safetensors", details_layout(d_sae))
    for name in ("neighbour_ids", "coactive_ids"):
        details[name][:] = -1

    def derived(block: tuple[int, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        begin, entries = block
        rows = examples.examples(begin, entries, shown)
        for name, values in rows.items():
            details[name][begin : begin + len(values)] = values
        return statistics(entries) | examples.reach(entries, shown) | {"top_token": rows["token_ids"][:, 0]}

    parts = list(in_order(derived, merge(runs, d_sae, folder / "records.safetensors", shifts=shifts, signed=signed)))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    records = open_arrays(folder / "records.safetensors")
    offsets, positions = records["offsets"], records["positions"]
    path = folder / "by-token.safetensors"  # for a moment
    features_n = create(path, {"features": ("U32", positions.shape)})["features"]
    at_a_time = min(RUN_ENTRIES, max(BLOCK_ENTRIES, len(shown.ids)))  # each time counts over all tokens
    starts = neighbours.by_token(offsets, positions, len(shown.ids), features_n, at_a_time)
    neighbours.coactive(offsets, positions, starts, features_n, details["coactive_ids"], details["coactive_counts"])
    path.unlink()
    return columns, details


def write_final_files(
    folder: Path,
    info: dict[str, Any],
    columns: dict[str, np.ndarray],
    details: dict[str, np.ndarray],
    sums: dict[str, np.ndarray],
    text: dict,
) -> None:
    """Writes the files that are the same for a build and a merge, and the columns that depend on how many tokens were scanned."""
    n_scanned = int(text["scanned"].sum())
    columns["density"] = (columns["count"] / n_scanned).astype(np.float32)
    columns["fvu_contribution"], fvu = contributions(sums, n_scanned)
    write_arrays(folder / "columns.safetensors", {name: columns[name] for name in sorted(columns)})
    write_arrays(folder / "token_features.safetensors", examples.by_top_token(details["token_ids"], details["token_shares"]))
    write_arrays(folder / "sums.safetensors", sums)
    write_arrays(folder / "tokens.safetensors", {name: text[name] for name in sorted(text)})
    checksums = {name: crc32(folder / f"{name}.safetensors") for name in CHECKED}
    write_json(folder / "index.json", info | {"tokens_scanned": n_scanned, "fvu": fvu, "crc32": checksums})


def choose_tokens(tokens: Any, cache: "ActivationCache", config: IndexConfig) -> np.ndarray:
    """The tokens to scan, bool [n]: those of all sequences of the splits, or of as many random ones as fit the budget.

    Whole sequences, because a window with unscanned tokens would show a feature as silent where it may not be.
    """
    from sae.activations.text.tokens import SPLITS

    unknown = [split for split in text_list(config.splits, "splits") if split not in SPLITS]
    if unknown or not config.splits:
        raise InputError(f"expected splits out of {', '.join(SPLITS)}, but got {', '.join(unknown) or 'none'}")
    if len(set(config.splits)) < len(config.splits):
        raise InputError(f"expected every split once, but got --splits {' '.join(config.splits)}")
    if len(tokens.ids) >= 1 << 32:
        raise InputError(f"expected fewer than 2^32 tokens in one cache, but {cache.folder} has {len(tokens.ids):,}; index parts of it")
    if config.tokens is not None and config.tokens < 1:
        raise InputError(f"expected at least 1 token to index, but got --tokens {config.tokens}")
    lengths = np.diff(tokens.sequence_starts)
    wanted_s = np.isin(tokens.sequence_split, [SPLITS.index(split) for split in config.splits])
    if config.tokens is not None:
        order = np.random.default_rng(0).permutation(np.flatnonzero(wanted_s))
        fitting = int(np.searchsorted(np.cumsum(lengths[order]), config.tokens, "right"))
        wanted_s = np.zeros(len(lengths), bool)
        wanted_s[order[: max(fitting, 1)]] = True
    if config.part is not None:
        i, n = part_of(config.part)
        wanted_s[np.delete(np.flatnonzero(wanted_s), np.s_[i - 1 :: n])] = False
    return np.repeat(wanted_s, lengths)


def part_of(part: str) -> tuple[int, int]:
    """(2, 4) of "2/4"; raises `InputError` for anything else."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"expected --part as i/n with i from 1 to n, for example 1/4, but got {part!r}")
    return int(found[1]), int(found[2])
