"""Index every feature of a dictionary in one pass over a cache.

b rows of a chunk · d model width · f features · n tokens of the cache · s sequences

The folder holds `index.json` and, as safetensors, `columns` (statistics and logit lens of every feature), `records` (all non-zero
activations, feature after feature: see csc.py), `details` (what a reader is shown of each feature: see examples.py and neighbours.py),
`token_features` (features by the token they fire on), `sums` (from which indexes of other text are merged: see contribution.py) and
`tokens` (the text, so that neither cache nor model is needed to browse).
"""

import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from sae.device import device_named
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.parts import Port
from sae.dictionaries.source import sampled_crc32, weights_crc32
from sae.disk.arrays import ANSWERS, EXPLANATIONS, create, open_arrays, write_arrays
from sae.disk.checksum import crc32
from sae.disk.folders import fresh_folder
from sae.disk.mapped import is_mapped
from sae.disk.places import require_folder
from sae.disk.writing import require_free_space, write_json
from sae.encoding import Encoder, Method
from sae.entries import Buffers
from sae.errors import InputError
from sae.features.index import examples, neighbours
from sae.features.index.contribution import MAX_ROWS, ErrorSums, contributions
from sae.features.index.csc import BLOCK_ENTRIES, MAX_FEATURES, RUN_ENTRIES, Spool, merge, statistics
from sae.features.index.lens import folded_unembedding, into_residual, logit_lens
from sae.features.index.opening import CHECKED, FORMAT_VERSION, details_layout
from sae.features.index.parallel import WORKERS, in_order
from sae.progress import progress
from sae.text_input import text_list

if TYPE_CHECKING:
    from sae.activations.cache import ActivationCache
    from sae.model.language_model import LanguageModel

CHUNK_BYTES = 1 << 26  # of one [b, f] block of activations, the only dense one there ever is
MOST_OPERATIONS = 10**15  # for all features together, on a CPU: about four hours on two cores
TEXT = ("ids", "sequence_starts", "sequence_document", "document_label", "sequence_split")


@dataclass(kw_only=True)
class IndexConfig:
    cache: Path
    """Activation cache that `sae cache` wrote."""
    dictionary: str
    """Folder, file or hub name of the dictionary."""
    out: Path
    """Folder for the index; an index that stands there is replaced."""
    tokens: int | None = None
    """Index at most this many tokens: whole sequences, drawn at random. Default: all."""
    splits: tuple[str, ...] = ("train", "held_out")
    """Splits of the cache to look at."""
    part: str | None = None
    """Only the i-th of n parts of these tokens, written i/n, for example 1/4; `sae merge` joins the parts."""
    model: str | None = None
    """Model for tokenizer and logit lens, by hub name, folder or GGUF file. Default: the one the cache names."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto takes a GPU when there is one."""
    encoder: Method | Literal["auto"] = "auto"
    """How pre-activations are computed; auto measures. It decides their last digits, so name one to repeat an index bit for bit."""
    verify: bool = False
    """First read the whole site in the cache to compare every checksum. Default: only those of token files up to 32 MB."""


def build_index(config: IndexConfig) -> Path:
    """Builds the folder whole or not at all, and gives its path.

    Memory: on a CPU up to four chunks of activations (64 MB each; one on CUDA), one run or block of 8M entries (about 200 MB) or the
    largest feature if that is more, and the tokens. Raises `InputError` when cache and dictionary do not belong together.
    """
    from sae.activations.joined import cache_of
    from sae.model.language_model import LanguageModel

    require_folder(config.out)
    dictionary = Dictionary.load(config.dictionary, device_named(config.device))
    cache = cache_of(config.cache, dictionary, named=config.model is not None, verify=config.verify)
    if dictionary.d_sae > MAX_FEATURES:
        raise InputError(f"expected at most {MAX_FEATURES:,} features, but the dictionary has {dictionary.d_sae:,}")
    model = LanguageModel.load(config.model or cache.model_name(), device="cpu")
    cache.require_model(model)
    with replacing_index(config.out) as folder:
        write_index(folder, config, dictionary, cache, model)
    print(f"indexed {dictionary.d_sae:,} features in {config.out}")
    return config.out


@contextmanager
def replacing_index(out: Path) -> Iterator[Path]:
    """`fresh_folder`, which says so when explanations go with the older index."""
    explained = (out / EXPLANATIONS).exists()
    with fresh_folder(out, "index.json", "index", keep=ANSWERS) as folder:  # somebody paid for a model's answers
        yield folder
    if explained:
        print(
            "the explanations of the older index went with it, since their scores are of its text: `sae explain` makes them again, "
            "and asks a model only for answers it has not given on this text"
        )


def write_index(folder: Path, config: IndexConfig, dictionary: Dictionary, cache: "ActivationCache", model: "LanguageModel") -> None:
    """Writes the files of an index into the empty `folder`."""
    from sae.model.vocabulary import vocabulary

    tokens = cache.tokens
    wanted = choose_tokens(tokens, cache, config)
    spool, scanned, sums, encoder = spool_activations(folder, dictionary, cache, wanted, config)
    text = {name: np.asarray(getattr(tokens, name)) for name in TEXT}
    columns, details = derive_columns(folder, spool.paths, dictionary.d_sae, text, signed=dictionary.gate.signed)
    for run in spool.paths:
        run.unlink()
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
        **checksum(config.dictionary, dictionary),
        "cache": str(config.cache),
        "model": cache.model,
        "site": sites_of(dictionary.reads) or cache.own_site,
        **({"site_out": sites_of(dictionary.writes), "d_out": dictionary.d_out} if dictionary.is_transcoder else {}),
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "splits": list(config.splits),
        "encoder": encoder,
        "activations": spool.entries,
        "activations_cut_to_65504": spool.clipped,
        "label_names": list(tokens.label_names),
        "logit_lens": lens,
        **({"cosine_neighbours": f"none: {alike}"} if alike else {}),
    }
    for what, none in (("logit lens", lens), ("neighbours by cosine", info.get("cosine_neighbours", ""))):
        if none.startswith("none: "):
            print(f"the index has no {what}: {none[6:]}", file=sys.stderr)
    text |= {
        "scanned": scanned,
        "piece_bytes": np.frombuffer(b"".join(vocab.pieces), np.uint8),
        "piece_lengths": np.array([len(p) for p in vocab.pieces], np.int32),
        "piece_special": vocab.special,
    }
    write_final_files(folder, info, columns, details, sums, text)


def sites_of(ports: tuple[Port, ...]) -> str | list[str | None] | None:
    """The name of the only site, or a list of several."""
    return ports[0].site if len(ports) == 1 else [port.site for port in ports]


def checksum(source: str, dictionary: Dictionary) -> dict[str, str]:
    """Entries of index.json by which the dictionary is known again."""
    parts = dictionary.parts()
    if is_mapped(parts.W_dec_fo):  # so that nobody who opens one feature has to read all
        return {"dictionary_crc32": sampled_crc32(parts), "dictionary_crc32_of": "samples"}
    return {"dictionary_crc32": weights_crc32(source, [parts])}


def too_long(operations: int, dictionary: Dictionary) -> str:
    """Why a product over all features is left out, or an empty text: so many operations keep a CPU busy for hours."""
    if dictionary.W_dec_fo.is_cuda or operations <= MOST_OPERATIONS:
        return ""
    return f"for {dictionary.d_sae:,} features it takes {operations:.0e} operations, which is left to a GPU (--device cuda)"


def lens_of(dictionary: Dictionary, site: str, model: "LanguageModel") -> tuple[dict[str, np.ndarray], str]:
    """What `logit_lens` gives, empty where there is none, and a sentence that says what it is or why there is none."""
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
    """Merges the runs into records.safetensors and makes what follows from the activations alone: columns, and the rows of details."""
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
    """Which tokens to look at, bool [n]: those of all sequences of the splits, or of as many random ones as fit the budget.

    Whole sequences, because a window in which some tokens were not looked at would show a feature as silent where it may not be.
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


def chunks(
    caches: Sequence["ActivationCache"], wanted: np.ndarray, splits: tuple[str, ...], size: int
) -> Iterator[tuple[list[Tensor], np.ndarray]]:
    """The wanted rows of caches of the same tokens, in their order: activations [b, d] of each, and their tokens [b]; at most `size`."""
    for split in splits:
        for shards in zip(*(cache.shards(split) for cache in caches), strict=True):
            x_nd, (rows, *_) = zip(*(cache.read(shard) for cache, shard in zip(caches, shards)))
            positions = np.asarray(rows)
            kept = np.flatnonzero(wanted[positions])
            for low in range(0, len(kept), size):
                part = kept[low : low + size]
                whole = len(part) == part[-1] - part[0] + 1  # a slice of the map, not a gather
                rows_of = slice(part[0], part[-1] + 1) if whole else torch.from_numpy(part)
                yield [x[rows_of] for x in x_nd], positions[part]


def spool_activations(
    folder: Path, dictionary: Dictionary, cache: "ActivationCache", wanted: np.ndarray, config: IndexConfig
) -> tuple[Spool, np.ndarray, dict[str, np.ndarray], str]:
    """Encodes the wanted rows and spools their non-zeros; also gives which tokens there were, bool [n], the error's sums, the encoder."""
    from sae.activations.joined import targets_of

    splits = config.splits
    spool, sums, local = Spool(folder, dictionary.d_sae), ErrorSums(dictionary), threading.local()
    scanned = np.zeros(len(wanted), bool)
    size = min(MAX_ROWS, max(1, CHUNK_BYTES // (dictionary.features_at_once * 4)))
    rows = sum(cache.rows(split) for split in splits)
    caches = [cache] if not dictionary.is_transcoder else [cache, targets_of(cache, dictionary)]
    total, checked = min(rows, int(wanted.sum())), False
    encoders: list[Encoder | None] = []
    choosing = threading.Lock()

    @torch.no_grad()
    def entries_of(chunk: tuple[list[Tensor], np.ndarray]) -> tuple[np.ndarray, ...]:
        local.buffers = buffers = getattr(local, "buffers", None) or Buffers()
        x_bd, *y_bo = (rows.to(dictionary.W_enc_fd.device, dictionary.dtype) for rows in chunk[0])
        with choosing:  # by the first chunk, for all
            if not encoders:
                encoders.append(dictionary.encoder(x_bd, config.encoder, total))
        entries = dictionary.entries(x_bd, buffers, encoders[0])
        values = entries.value_n.float().cpu().numpy()  # host sync
        if not np.isfinite(values).all():
            raise InputError(f"activations of tokens near {chunk[1][0]} in {cache.folder} are NaN or infinite; harvest the cache again")
        sums.add(x_bd, entries, *y_bo)
        return chunk[1], entries.row_n.cpu().numpy(), entries.feature_n.cpu().numpy(), values  # host sync

    workers = 1 if dictionary.W_enc_fd.is_cuda else WORKERS
    with progress("index", total, "tokens") as bar:
        for positions, *entries in in_order(entries_of, chunks(caches, wanted, splits, size), workers):
            spool.add(positions, *entries)
            scanned[positions] = True
            bar.advance(len(positions), active=f"{spool.entries / (bar.done + len(positions)):.1f} per token")
            if not checked and spool.paths:  # once it is known how sparse the code is: runs, merged file and its transpose
                require_free_space(folder, int(16 * spool.entries * (total / bar.done)), "the index")
                checked = True
    spool.flush()
    if not scanned.any():
        raise InputError(
            f"expected activations in the splits {', '.join(splits)} of {cache.folder}, but there are none; name other --splits"
        )
    encoder = encoders[0].method if encoders[0] else "product"
    if encoder != "product":
        print(f"encoded by {encoder}; name it with --encoder to repeat this index bit for bit")
    return spool, scanned, sums.sums, encoder
