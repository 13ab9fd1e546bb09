"""The store as a whole: whatever is done to a harvest on its way, the finished cache has the bytes of one that nothing was done to,
returns the rows of a plain in-memory model, and none before it is finished."""

import json
import os
import random
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_cache import write_cache
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from live_world import SITE, make_world
from several_processes import forked
from test_harvest import change, different, in_child

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.errors import InputError
from sae.model.language_model import LanguageModel

BATCH = 37


class Plain:
    """An uninterrupted cache, and what it must give, held in memory."""

    def __init__(self, folder: Path):
        options = make_world(folder, 40) | {"pool_tokens": 200, "tokens": 1200}
        self.config = HarvestConfig(out=folder / "whole", shard_tokens=60, **options)
        harvest(self.config)
        cache = ActivationCache.open(self.config.out)
        self.streams = {
            (split, world, rank): self._stream(cache, split, world, rank)
            for split in ("train", "held_out")
            for world in (1, 2)
            for rank in range(world)
        }

    def _stream(self, cache: ActivationCache, split: str, world: int, rank: int) -> torch.Tensor:
        batches = CachedSource(cache).batches(BATCH, seed=1, split=split, rank=rank, world=world, buffer_bytes=64 * 32 * 3)
        return torch.stack([next(batches)[cache.site] for _ in range(3 * cache.rows(split) // BATCH + 1)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Plain:
    return Plain(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_plain_cache_holds_what_the_model_computes_and_an_epoch_is_all_of_it(plain, split):
    cache, lm = ActivationCache.open(plain.config.out), LanguageModel.load(plain.config.model, device="cpu")
    tokens, expected = cache.tokens, {}
    for sequence in np.flatnonzero(tokens.sequence_split == ("train", "held_out").index(split)):
        start, stop = tokens.sequence_starts[sequence : sequence + 2]
        ids = torch.from_numpy(np.array(tokens.ids[start:stop])).long()
        hidden_pd = lm.model(ids[None], output_hidden_states=True).hidden_states[1][0].detach()
        expected |= dict(zip(range(start + 1, stop), hidden_pd[1:]))  # without beginning of text
    acts, rows = (torch.cat(tensors) for tensors in zip(*(cache.read(shard) for shard in cache.shards(split))))
    assert sorted(rows.tolist()) == sorted(expected)
    torch.testing.assert_close(acts.float(), torch.stack([expected[row] for row in rows.tolist()]), rtol=1e-3, atol=1e-4)
    drawn = plain.streams[split, 1, 0].flatten(0, 1)
    for epoch in range(2):
        found = drawn[epoch * len(rows) : (epoch + 1) * len(rows)].tolist()
        assert sorted(found) == sorted(acts.float().tolist())


class Store(RuleBasedStateMachine):
    plain: Plain

    @initialize()
    def begin(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        self.config = change(self.plain.config, out=self.place / "cache")

    def teardown(self) -> None:
        shutil.rmtree(self.place)

    @property
    def finished(self) -> bool:
        return (self.config.out / "manifest.json").exists()

    @precondition(lambda self: not self.finished)
    @rule(moment=st.integers(0, 70))
    def killed(self, moment: int) -> None:
        in_child(self.config, kill_at_sync=moment)

    @precondition(lambda self: not self.finished)
    @rule(rank=st.integers(0, 1), moment=st.integers(0, 30))
    def one_of_two_killed(self, rank: int, moment: int) -> None:
        forked(partial(harvest, self.config), 2, self.place / "log", (rank, moment))

    @rule(processes=st.integers(1, 2))
    def resumed(self, processes: int) -> None:
        assert forked(partial(harvest, self.config), processes, self.place / "log") == [0] * processes
        assert self.finished

    @precondition(lambda self: not self.finished)
    @rule(seed=st.integers(0, 99))
    def progress_torn(self, seed: int) -> None:
        for path in self.config.out.glob("progress*.jsonl"):
            os.truncate(path, random.Random(seed).randint(0, path.stat().st_size))

    @precondition(lambda self: not self.finished)
    @rule(seed=st.integers(0, 99), cut=st.booleans())
    def file_lost(self, seed: int, cut: bool) -> None:
        files = sorted(self.config.out.glob("*/*.safetensors"))
        if files:
            path = random.Random(seed).choice(files)
            path.write_bytes(path.read_bytes()[:-7]) if cut else path.unlink()

    @precondition(lambda self: (self.config.out / SITE).exists() and not self.finished)
    @rule()
    def left_half_written(self) -> None:
        (self.config.out / SITE / ".00000.safetensors.123.tmp").write_bytes(b"half")

    @rule(split=st.sampled_from(["train", "held_out"]), reader=st.sampled_from([(1, 0), (2, 0), (2, 1)]), data=st.data())
    def read(self, split: str, reader: tuple[int, int], data: st.DataObject) -> None:
        if not self.finished:
            with pytest.raises(InputError, match=r"not finished|does not exist"):
                ActivationCache.open(self.config.out)
            return
        stream = self.plain.streams[(split, *reader)]
        cache = ActivationCache.open(self.config.out)
        batches = CachedSource(cache).batches(BATCH, seed=1, split=split, world=reader[0], rank=reader[1], buffer_bytes=64 * 32 * 3)
        for position in data.draw(st.lists(st.integers(0, len(stream) - 1), max_size=4)):
            batches.seek(position)
            assert torch.equal(next(batches)[cache.site], stream[position])

    @invariant()
    def whole_once_finished(self) -> None:
        if self.finished and not list(self.config.out.glob("progress*")):
            assert different(self.config.out, self.plain.config.out) == []


def test_any_history_ends_with_the_same_cache(plain):
    Store.plain = plain
    bounds = dict(max_examples=8, stateful_step_count=10, deadline=None, phases=[Phase.generate])  # shrinking takes minutes
    limits = settings(**bounds, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Store, settings=limits)


def test_a_file_is_on_disk_before_the_ledger_names_it_and_all_are_before_the_manifest(plain, tmp_path, monkeypatch):
    """In the order of the operating system's calls: the file's bytes, its name, the folder with the name; then the line about it."""
    out = tmp_path / "cache"
    events: list[tuple] = []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        fsync(handle)
        named = [json.loads(line) for line in Path(path).read_text().splitlines()] if path.endswith(".jsonl") else []
        events.append(("sync", path, named))

    def seen_replace(source: Path, target: Path) -> None:
        replace(source, target)
        if not str(target).endswith(".tmp"):  # from one temporary name to another
            events.append(("name", str(source), str(target)))

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)  # in Python 3.10 it does not look os.replace up
    harvest(change(plain.config, out=out))

    durable: set[str] = set()  # after each event
    synced: set[str] = set()
    fresh: dict[str, set[str]] = {}  # folder -> files with bytes on disk whose names are not yet
    checked = 0
    for kind, first, second in events:
        if kind == "name":
            assert first in synced, f"{second} was named before its bytes were on disk"
            fresh.setdefault(str(Path(second).parent), set()).add(second)
            if second.endswith("manifest.json"):
                assert {str(path) for path in out.glob("*/*.safetensors")} <= durable
        elif first.endswith(".jsonl"):
            for entry in second:
                shards = entry.get("shards", [])
                names = [entry["file"]] if "file" in entry else [f"{site}/{s['name']}.safetensors" for s in shards for site in s["files"]]
                assert {str(out / name) for name in names} <= durable
                checked += len(names)
        else:
            synced.add(first)
            durable |= fresh.pop(first, set())
    assert checked > 20
    assert {str(out), str(tmp_path)} <= synced  # the folders of sites and tokens, and the cache's own


def test_a_machine_of_another_byte_order_is_refused(tmp_path, monkeypatch):
    write_cache(tmp_path, [5])
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(InputError, match="little-endian"):
        ActivationCache.open(tmp_path)


@pytest.mark.parametrize("version", [0, 99, "1", None])
def test_a_harvest_begun_in_another_format_is_refused(plain, tmp_path, version):
    config = change(plain.config, out=tmp_path / "cache")
    in_child(config, kill_at_sync=20)
    begun = json.loads((config.out / "harvest.json").read_text())
    (config.out / "harvest.json").write_text(json.dumps(begun | {"format_version": version}))
    with pytest.raises(InputError, match="format version"):
        harvest(config)
