"""Parts indexed apart and joined are one pass, byte for byte; what does not belong together is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from feature_world import VOCABULARY, save_dictionary

from sae.errors import InputError
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.merge import MergeConfig, merge_indexes
from sae.features.index.reader import FeatureIndex


def config_of(world, out, **changes):
    return IndexConfig(cache=world.cache, dictionary=world.dictionary_folder, out=out, device="cpu", **changes)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["parts", "splits"])
def test_parts_merged_equal_one_pass_byte_for_byte(world, tmp_path, kind):
    changes = [{"part": f"{i}/3"} for i in (1, 2, 3)] if kind == "parts" else [{"splits": (split,)} for split in ("train", "held_out")]
    parts = [build_index(config_of(world, tmp_path / f"part-{i}", **change)) for i, change in enumerate(changes)]
    scanned = [FeatureIndex.open(part).info["tokens_scanned"] for part in parts]
    assert min(scanned) > 0
    assert sum(scanned) == world.index.info["tokens_scanned"]
    joined, whole = files_of(merge_indexes(MergeConfig(parts=tuple(parts), out=tmp_path / "joined"))), files_of(world.index.folder)
    assert set(joined) == set(whole)
    for name in whole:
        assert joined[name] == whole[name], name


def test_the_order_of_the_parts_does_not_matter(world, tmp_path):
    parts = [build_index(config_of(world, tmp_path / str(i), part=f"{i}/2", tokens=2000)) for i in (1, 2)]
    one = files_of(merge_indexes(MergeConfig(parts=tuple(parts), out=tmp_path / "one")))
    other = files_of(merge_indexes(MergeConfig(parts=tuple(parts[::-1]), out=tmp_path / "other")))
    assert one == other


def test_indexes_of_other_text_are_laid_end_to_end(world, tmp_path):
    """The other cache has other documents, and its labels in another order."""
    from sae.activations.harvest.command import HarvestConfig, harvest

    lines = [json.dumps({"text": f"A zebrafly hums {i} times. ", "domain": ("markup", "birds")[i % 2]}) for i in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    harvest(
        HarvestConfig(
            text=(str(tmp_path / "text.jsonl"),),
            label_field="domain",
            out=tmp_path / "cache",
            model=str(world.model),
            sites=("resid_pre.0",),
            tokens=500,
            context=32,
            dtype="float32",
            held_out=0.1,
            device="cpu",
            shard_tokens=1000,
            pool_tokens=2500,
        )
    )
    build_index(dataclasses.replace(config_of(world, tmp_path / "other"), cache=tmp_path / "cache"))
    other, first = FeatureIndex.open(tmp_path / "other"), world.index
    joined = FeatureIndex.open(merge_indexes(MergeConfig(parts=(first.folder, other.folder), out=tmp_path / "joined")))
    n = len(first.tokens["ids"])
    np.testing.assert_array_equal(joined.tokens["ids"], np.r_[first.tokens["ids"], other.tokens["ids"]])
    for j in range(joined.d_sae):
        one, two, both = first.feature(j), other.feature(j), joined.feature(j)
        np.testing.assert_array_equal(both.positions, np.r_[one.positions, two.positions + n])
        np.testing.assert_array_equal(both.values, np.r_[one.values, two.values])
    np.testing.assert_array_equal(joined.columns["count"], first.columns["count"] + other.columns["count"])
    labels = lambda index: [c.label for j in range(40) for c in index.random_contexts(j, 10**6)]  # noqa: E731
    assert sorted(labels(joined)) == sorted(labels(first) + labels(other))
    assert joined.info["tokens_scanned"] == first.info["tokens_scanned"] + other.info["tokens_scanned"]

    halves = [build_index(config_of(world, tmp_path / f"half-{i}", part=f"{i}/2")) for i in (1, 2)]
    of_both = merge_indexes(
        MergeConfig(parts=(halves[0], other.folder, halves[1]), out=tmp_path / "of-both")
    )  # two of the three share a text
    a, b = files_of(of_both), files_of(joined.folder)
    for name in set(a) - {"index.json"}:
        assert a[name] == b[name], name
    with pytest.raises(InputError, match="one of the parts"):
        merge_indexes(MergeConfig(parts=(halves[0], halves[1]), out=halves[1]))
    with pytest.raises(InputError, match="in more than one of"):
        merge_indexes(MergeConfig(parts=(halves[0], halves[0], other.folder), out=tmp_path / "twice"))


def test_what_does_not_belong_together_is_refused(world, tmp_path):
    save_dictionary(tmp_path / "dictionary", torch.ones(40, VOCABULARY), torch.zeros(40), world.cache)
    config = dataclasses.replace(config_of(world, tmp_path / "stranger", tokens=500), dictionary=tmp_path / "dictionary")
    stranger = build_index(config)
    for parts, words in (
        ((world.index.folder,), "at least two"),
        ((world.index.folder, world.index.folder), "in more than one of"),
        ((world.index.folder, stranger), "dictionary_crc32"),
        ((world.index.folder, tmp_path / "none"), "none"),
    ):
        with pytest.raises(InputError, match=words):
            merge_indexes(MergeConfig(parts=parts, out=tmp_path / "joined"))
        assert not (tmp_path / "joined").exists()
