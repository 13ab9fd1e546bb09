"""A harvest to a URL writes the files that one to a folder writes, whatever interrupts it, and the manifest after all others."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from kills import killed, limited
from live_world import make_world
from remote_world import contents

from sae.activations.files.ledger import Ledger
from sae.activations.harvest import command
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.imports.command import ImportConfig, import_activations
from sae.disk.remote import RemotePath
from sae.errors import InputError
from sae.processes import Processes

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # children are forked below


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    return make_world(tmp_path_factory.mktemp("world"), 30)


@pytest.fixture
def config(world, flaky) -> HarvestConfig:
    return HarvestConfig(out=RemotePath("flaky://place/cache"), **world | {"pool_tokens": 400, "shard_tokens": 150})


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> dict[str, bytes]:
    """What a harvest into a folder makes."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    harvest(HarvestConfig(out=out, **world | {"pool_tokens": 400, "shard_tokens": 150}))
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def uploads() -> list[Path]:
    return list((Path(os.environ["SAE_BLOCK_CACHE"]) / "uploads").glob("*"))


@pytest.mark.parametrize("url", ["flaky://place/cache", "s3://activations/some/cache"])
def test_the_files_are_those_of_a_folder(config, whole, request, capsys, url):
    request.getfixturevalue("s3" if url.startswith("s3") else "flaky")
    config = replace(config, out=RemotePath(url))
    assert harvest(config) == config.out
    assert contents(url) == whole
    assert uploads() == []
    said = capsys.readouterr()
    assert f"{url} cannot be locked (it is behind a URL): see to it that no other run writes into it" in said.err
    assert f"{url}: " in said.out
    harvest(config)
    assert f"{url} is already complete" in capsys.readouterr().err
    harvest(HarvestConfig(out=config.out, verify=True))
    assert "every file is as it was written" in capsys.readouterr().out


def test_a_lost_connection_is_mended_or_said_and_the_harvest_goes_on_later(config, whole, flaky, capsys):
    flaky.faults["write"].extend([None] * 3 + ["short", OSError("unplugged")])
    harvest(config)
    assert contents(str(config.out)) == whole
    assert "1 of 3 times" in capsys.readouterr().err
    writes = flaky.calls["write"] - 2
    for number in range(0, writes, 3):
        flaky.clear()
        flaky.faults["write"].extend([None] * number + [OSError("unplugged")] * 99)
        with pytest.raises(InputError, match=r"the connection to flaky://\S+ is lost \(unplugged\), and 3 further tries have not helped"):
            harvest(config)
        assert "manifest.json" not in contents(str(config.out)) or number > writes - 3
        flaky.faults.clear()
        flaky.calls.clear()
        harvest(config)
        assert contents(str(config.out)) == whole
        assert number < 12 or flaky.calls["write"] < writes - number + 12  # what was noted is not done again
    assert uploads() == []


def test_a_kill_at_any_moment_costs_nothing(config, whole, tmp_path):
    for number in range(1, 10_000, 37):
        url = f"file://{tmp_path}/{number}"
        mine = replace(config, out=RemotePath(url))
        if not killed(partial(harvest, mine), number, tmp_path):
            break
        found = contents(url)
        assert "manifest.json" not in found or found.keys() >= whole.keys()
        harvest(mine)
        assert contents(url) == whole
    assert 60 < number < 1000
    assert uploads() == []


def test_a_full_local_disk_is_said(config):
    assert limited(partial(harvest, config), 1500) == 2
    assert contents(str(config.out)) == {}  # of this process; the child had memory of its own
    assert uploads() == []


def test_several_processes_make_the_same_files(config, whole):
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as ranks:
        helping = ranks.submit(command._help, config, Processes(store, 1, 2, 1, 2))
        ranks.submit(command._lead, config, Processes(store, 0, 2, 0, 2)).result()
        helping.result()
    assert contents(str(config.out)) == whole


def test_what_a_helper_noted_before_it_was_killed_is_not_done_again(config, whole, flaky):
    harvest(config)
    flaky.rm_file("/place/cache/manifest.json")
    manifest = json.loads(whole["manifest.json"])
    assert len(manifest["shards"]) > 4
    ledger = Ledger.of_place(config.out, 1)
    assert ledger.entries == []  # only the leader reads
    ledger.append({"kind": "tokens", **manifest["tokens"][0]})
    again = Ledger.of_place(config.out, 1)
    again.append({"kind": "tokens", **manifest["tokens"][0]})
    leader = Ledger.of_place(config.out)
    leader.take_over()
    leader.take_over()
    assert len(leader.entries) == 2
    leader.clear()
    assert not [name for name in contents(str(config.out)) if name.startswith("progress")]


def test_places_that_are_taken_or_cannot_be_written(config, s3, flaky):
    flaky.pipe_file("/place/cache/other.txt", b"mine")
    with pytest.raises(InputError, match=r"expected an empty folder or an unfinished cache at flaky://place/cache, but it holds 'other"):
        harvest(config)
    assert contents(str(config.out)) == {"other.txt": b"mine"}
    with pytest.raises(InputError, match=r"s3://nowhere/cache cannot be written \(there is no nowhere\); make its bucket first"):
        harvest(replace(config, out=RemotePath("s3://nowhere/cache")))
    with pytest.raises(InputError, match=r"hf://datasets/me/mine cannot be written file by file, .* upload-large-folder"):
        harvest(replace(config, out=RemotePath("hf://datasets/me/mine")))
    flaky.faults["write"].append(PermissionError(13, "Forbidden"))
    with pytest.raises(InputError, match=r"access to flaky://elsewhere is refused \(Forbidden\)"):
        harvest(replace(config, out=RemotePath("flaky://elsewhere")))


def test_a_harvest_goes_on_with_the_same_settings_only(config, flaky):
    flaky.faults["write"].extend([None] * 9 + [OSError("unplugged")] * 99)
    with pytest.raises(InputError, match="is lost"):
        harvest(config)
    flaky.faults.clear()
    with pytest.raises(InputError, match=r"flaky://place/cache was started with settings seed = 0, but now it is 1"):
        harvest(replace(config, seed=1))


def test_text_that_cannot_be_used_leaves_nothing(config, tmp_path, flaky):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="holds no usable text"):
        harvest(replace(config, text=(str(tmp_path / "empty.txt"),), text_field="text"))
    assert contents(str(config.out)) == {}


def test_activations_are_imported_to_a_url(tmp_path, flaky):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(2000, 5)).astype(np.float32))
    settings = dict(source=(tmp_path / "x.npy",), site="resid_post.1", shard_tokens=300)
    here = import_activations(ImportConfig(out=tmp_path / "here", **settings))
    import_activations(ImportConfig(out=RemotePath("flaky://there"), **settings))
    expected = {str(path.relative_to(here)): path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert contents("flaky://there") == expected
