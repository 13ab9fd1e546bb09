"""Several processes index one cache: the bytes of one, whichever dies; what was finished is not done again; one sentence for bad input."""

import dataclasses
import json
import shutil
from functools import partial

import pytest
from several_processes import flags, forked, said, torchrun
from test_merge import config_of, files_of

from sae.errors import InputError
from sae.features.index.build import build_index
from sae.features.index.csc import Spool


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_bytes(world, tmp_path, processes):
    assert forked(partial(build_index, config_of(world, tmp_path / "index")), processes, tmp_path / "log") == [0] * processes
    assert files_of(tmp_path / "index") == files_of(world.index.folder)
    first, *others = said(tmp_path / "log")
    assert first.count("index: ") == first.count("indexed 40 features") == 1
    rows = world.index.info["tokens_scanned"]
    assert f"index: {rows:,} of {rows:,} rows" in first
    assert f", {len(world.index.positions) / rows:.1f} active per token\n" in first
    assert set(others) == {""}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["index"]


@pytest.mark.parametrize(("kill", "then"), [((0, 3), 2), ((0, 9), 1), ((1, 2), 3), ((1, 6), 1)])
def test_a_killed_process_costs_nothing_but_its_piece(world, tmp_path, kill, then):
    config = config_of(world, tmp_path / "index")
    codes = forked(partial(build_index, config), 2, tmp_path / "log", kill)
    if codes != [0, 0]:  # so it is when the one to be killed found no piece left
        assert codes[kill[0]] == -9
        assert "same command again" in said(tmp_path / "log")[1 - kill[0]]
        assert not config.out.exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".index.pieces/??????.safetensors")}
    done = []
    flush = Spool.flush

    def noted(self):
        done.append(self.name)
        flush(self)

    if then == 1:
        Spool.flush = noted  # type: ignore[method-assign]
        try:
            build_index(config)
        finally:
            Spool.flush = flush  # type: ignore[method-assign]
        assert not {path.stem for path in finished} & set(done)
    else:
        assert forked(partial(build_index, config), then, tmp_path / "then") == [0] * then
    assert files_of(config.out) == files_of(world.index.folder)


def test_pieces_of_other_settings_are_not_used(world, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("sae.features.index.build.write_index", lambda *_: (_ for _ in ()).throw(InputError("stop")))
        with pytest.raises(InputError, match="stop"):
            build_index(config_of(world, tmp_path / "index", tokens=1000))
    assert list(tmp_path.glob(".index.pieces/??????.safetensors"))
    build_index(config_of(world, tmp_path / "index"))
    assert files_of(tmp_path / "index") == files_of(world.index.folder)


def test_torchrun_indexes_with_one_voice(world, tmp_path):
    run = torchrun("index", *flags(config_of(world, tmp_path / "index")), processes=2)
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    assert files_of(tmp_path / "index") == files_of(world.index.folder)
    assert out.count("indexed 40 features") == 1


def test_processes_with_other_settings_caches_or_without_the_file_are_one_sentence(world, tmp_path):
    import os

    shutil.copytree(world.cache, tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest | {"seed": 9}))
    config = config_of(world, tmp_path / "index")
    for change, sentence in (
        ({"tokens": 1000}, "same tokens in every process, but process 1 has 1000 and process 0 None"),
        ({"cache": tmp_path / "cache"}, "same cache in every process"),
        ({"dictionary": tmp_path / "none"}, "none"),
    ):

        def work(change=change):
            build_index(dataclasses.replace(config, **change) if os.environ["RANK"] == "1" else config)

        assert forked(work, 2, tmp_path / "log") == [2, 2]
        assert [text.count("error: ") for text in said(tmp_path / "log")] == [0, 1]
        assert sentence in said(tmp_path / "log")[1]
        assert not config.out.exists()
