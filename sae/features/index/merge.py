"""Join indexes of one dictionary that were built separately, on other parts of a cache or on other caches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae.disk.places import require_folder
from sae.disk.writing import require_free_space
from sae.errors import InputError
from sae.features.index.build import TEXT, derive_columns, replacing_index, write_final_files
from sae.features.index.contribution import carried
from sae.features.index.opening import open_sums
from sae.features.index.reader import FeatureIndex

SAME = ("dictionary_crc32", "model", "site", "d_in", "d_sae", "logit_lens")
OF_DECODER = ("neighbour_ids", "neighbour_cosines", "lens_counts")  # the same in every part


@dataclass(kw_only=True)
class MergeConfig:
    parts: tuple[Path, ...]
    """Folders of the indexes to join, two or more."""
    out: Path
    """Folder for the joined index; an existing index in it is replaced."""


def merge_indexes(config: MergeConfig) -> Path:
    """Builds the joined index completely or not at all, and returns its path.

    Parts of one cache have the same bytes as one pass over all their tokens; indexes of different caches are concatenated. Raises
    `InputError` for parts that do not belong together and for tokens that are in two of them.
    """
    if len(config.parts) < 2:
        raise InputError(f"expected at least two indexes to join, but got {len(config.parts)}")
    require_folder(config.out)
    parts = [FeatureIndex.open(folder, verify=True) for folder in config.parts]
    for part in parts[1:]:
        for name in SAME:
            if part.info[name] != parts[0].info[name]:
                raise InputError(
                    f"expected indexes of one dictionary, but {name} is {parts[0].info[name]!r} in {parts[0].folder} and "
                    f"{part.info[name]!r} in {part.folder}"
                )
    if config.out.resolve() in [part.folder.resolve() for part in parts]:
        raise InputError(f"expected --out to be a separate folder, but {config.out} is one of the parts")
    text, shifts, label_names = joined_text(parts)
    require_free_space(config.out, 10 * sum(len(part.positions) for part in parts), "the joined index")
    with replacing_index(config.out) as folder:
        runs = [part.folder / "records.safetensors" for part in parts]
        columns, details = derive_columns(folder, runs, parts[0].d_sae, text, shifts, parts[0].negative is not None)
        for name in OF_DECODER:
            details[name][:] = parts[0].details[name]
        for name in parts[0].columns:
            if name == "decoder_norm" or name.startswith(("top_token_", "bottom_token_")):
                columns[name] = parts[0].columns[name]
        every = [open_sums(part.folder, part.info) for part in parts]
        sums = {name: carried(np.sum([one[name] for one in every], axis=0)) for name in every[0]}
        write_final_files(folder, joined_info(parts, label_names), columns, details, sums, text)
    print(f"joined {len(parts)} indexes of {parts[0].d_sae:,} features in {config.out}")
    return config.out


def joined_text(parts: list[FeatureIndex]) -> tuple[dict[str, np.ndarray], list[int], list[str]]:
    """Arrays of tokens.safetensors, the shifts of each part's positions, and the names of the labels.

    Parts of one text share it; different texts are concatenated.
    """
    first = parts[0].tokens
    pieces = {name: first[name] for name in ("piece_bytes", "piece_lengths", "piece_special")}
    if not all(np.array_equal(pieces[name], part.tokens[name]) for part in parts[1:] for name in pieces):
        raise InputError(f"expected indexes with one vocabulary, but those of {', '.join(str(part.folder) for part in parts)} differ")
    texts: list[list[FeatureIndex]] = []
    for part in parts:
        same = next((text for text in texts if same_text(text[0], part)), None)
        if same is None:
            texts.append([part])
        else:
            same.append(part)
    scanned = [joined_scanned(text) for text in texts]
    if len(texts) == 1:
        return {name: first[name] for name in TEXT} | pieces | {"scanned": scanned[0]}, [0] * len(parts), parts[0].info["label_names"]
    ones = [text[0] for text in texts]
    label_names = list(dict.fromkeys(name for one in ones for name in one.info["label_names"]))
    shifts = np.cumsum([0] + [len(one.tokens["ids"]) for one in ones]).tolist()
    documents = np.cumsum([0] + [len(one.tokens["document_label"]) for one in ones]).tolist()
    if shifts[-1] >= 1 << 32:
        raise InputError(f"expected fewer than 2^32 tokens in one index, but the parts have {shifts[-1]:,}")
    number_of = {name: number for number, name in enumerate(label_names)}
    numbers = [np.array([number_of[name] for name in one.info["label_names"]] + [-1], np.int32) for one in ones]
    joined = {
        "ids": np.concatenate([one.tokens["ids"] for one in ones]),
        "sequence_starts": np.concatenate(
            [one.tokens["sequence_starts"][:-1] + shift for one, shift in zip(ones, shifts)] + [np.array(shifts[-1:])]
        ),
        "sequence_document": np.concatenate([one.tokens["sequence_document"] + shift for one, shift in zip(ones, documents)]),
        "document_label": np.concatenate([new[one.tokens["document_label"]] for one, new in zip(ones, numbers)]),
        "sequence_split": np.concatenate([one.tokens["sequence_split"] for one in ones]),
        "scanned": np.concatenate(scanned),
    }
    place = [next(i for i, text in enumerate(texts) if any(member is part for member in text)) for part in parts]
    return joined | pieces, [shifts[i] for i in place], label_names


def same_text(one: FeatureIndex, other: FeatureIndex) -> bool:
    names = one.info["label_names"] == other.info["label_names"]
    return names and all(np.array_equal(one.tokens[name], other.tokens[name]) for name in TEXT)


def joined_scanned(parts: list[FeatureIndex]) -> np.ndarray:
    """The tokens of their text that any part scanned, bool [n]; `InputError` if two parts scanned the same."""
    scanned = np.zeros(len(parts[0].tokens["scanned"]), np.int64)
    for part in parts:
        scanned += part.tokens["scanned"]
    if scanned.max() > 1:
        raise InputError(
            f"expected parts with different tokens, but {int((scanned > 1).sum()):,} tokens are in more than one of "
            f"{', '.join(str(part.folder) for part in parts)}; build them with --part 1/{len(parts)} and so on"
        )
    return scanned > 0


def joined_info(parts: list[FeatureIndex], label_names: list[str]) -> dict[str, Any]:
    infos = [part.info for part in parts]
    return {
        **{name: value for name, value in infos[0].items() if name not in ("tokens_scanned", "fvu", "crc32")},
        "cache": " + ".join(dict.fromkeys(info["cache"] for info in infos)),
        "splits": list(dict.fromkeys(split for info in infos for split in info["splits"])),
        "label_names": label_names,
        "encoder": " and ".join(dict.fromkeys(info.get("encoder", "product") for info in infos)),  # older indexes do not say
        **{name: sum(info[name] for info in infos) for name in ("activations", "activations_cut_to_65504")},
    }
