"""Blocks on the local disk: what was put is what is got, whatever befalls the files; bounded; those in use stay."""

import os
import signal
import time
from itertools import count
from pathlib import Path

import pytest

from sae.disk import blocks
from sae.disk.blocks import CRC_BYTES, Blocks
from sae.errors import InputError

SIZE = 1000
ON_DISK = SIZE + CRC_BYTES


def block(number: int) -> memoryview:
    return memoryview(bytes([number]) * SIZE)


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def held(kept: Blocks, file: str) -> set[int]:
    return {number for number in range(99) if kept.get(file, number, SIZE) == block(number)}


def test_what_was_put_is_what_is_got(tmp_path):
    kept = Blocks(tmp_path, 10 * ON_DISK)
    assert kept.get("a", 0, SIZE) is None
    for number in (0, 7):
        kept.put("a", number, block(number))
    kept.put("b", 0, block(9))
    assert held(kept, "a") == {0, 7}
    assert Blocks(tmp_path, 0).get("b", 0, SIZE) == block(9)  # in another process, however little that may keep


@pytest.mark.parametrize("damage", [b"", b"abc", b"\0" * ON_DISK, b"\1" * (ON_DISK - 1), b"\1" * SIZE + b"1234"])
def test_a_damaged_block_is_none(tmp_path, damage):
    kept = Blocks(tmp_path, 10 * ON_DISK)
    kept.put("a", 1, block(1))
    (tmp_path / "a" / "1").write_bytes(damage)
    assert kept.get("a", 1, SIZE) is None
    assert not (tmp_path / "a" / "1").exists()
    kept.put("a", 1, block(1))
    assert held(kept, "a") == {1}


def test_a_full_folder_keeps_what_is_in_use_and_says_so_once(tmp_path, capsys):
    kept = Blocks(tmp_path, 3 * ON_DISK)
    for number in range(6):
        kept.put("a", number, block(number))
    assert held(kept, "a") == {0, 1, 2}
    assert used(tmp_path) == 3 * ON_DISK
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{tmp_path} takes no more blocks (it may have 3.012e-06 GB")
    assert "SAE_BLOCK_CACHE_GB and SAE_BLOCK_CACHE give it room" in said


def test_blocks_that_nobody_has_read_for_longest_make_room(tmp_path):
    earlier = Blocks(tmp_path, 4 * ON_DISK)
    for number in range(4):
        earlier.put("old", number, block(number))
        os.utime(tmp_path / "old" / str(number), (0, time.time() - 100 + number))
    now = Blocks(tmp_path, 4 * ON_DISK)
    now.get("old", 0, SIZE)
    now.put("new", 5, block(5))
    assert held(Blocks(tmp_path, 0), "old") == {0, 2, 3}
    now = Blocks(tmp_path, 4 * ON_DISK)
    for number in range(6):
        now.put("new", number, block(number))
    assert used(tmp_path) == 4 * ON_DISK
    assert len(held(now, "new")) >= 3


def test_processes_share_the_bound(tmp_path):
    one, other = (Blocks(tmp_path, 300 * ON_DISK) for _ in range(2))
    for number in range(300):
        one.put("one", number, block(number % 256))
        other.put("other", number, block(number % 256))
    assert used(tmp_path) <= 300 * ON_DISK + 2 * max(blocks.BLOCK_BYTES, 300 * ON_DISK // 64)


def test_a_full_disk_is_said_and_costs_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(blocks, "KEPT_FREE", 1 << 62)
    kept = Blocks(tmp_path, 10 * ON_DISK)
    kept.put("a", 1, block(1))
    assert kept.get("a", 1, SIZE) is None
    assert "GB of the disk stay free" in capsys.readouterr().err


@pytest.mark.parametrize("errno", [28, 13])
def test_a_disk_that_refuses_is_said(tmp_path, capsys, monkeypatch, errno):
    kept = Blocks(tmp_path, 10 * ON_DISK)
    kept.has_room(SIZE)

    def refuse(self, target):
        raise OSError(errno, os.strerror(errno))

    monkeypatch.setattr(Path, "replace", refuse)
    kept.put("a", 1, block(1))
    kept.put("a", 2, block(2))
    assert capsys.readouterr().err.startswith(f"{tmp_path} takes no more blocks ({os.strerror(errno)}): ")
    assert used(tmp_path) == 0


def test_a_folder_that_cannot_be_made_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    kept = Blocks(tmp_path / "file" / "blocks", 10 * ON_DISK)
    assert not kept.has_room(SIZE)
    assert "takes no more blocks (Not a directory)" in capsys.readouterr().err


def test_the_environment_says_where_and_how_many(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_BLOCK_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("SAE_BLOCK_CACHE_GB", "2.5")
    blocks.blocks.cache_clear()
    assert (blocks.blocks().folder, blocks.blocks().limit) == (tmp_path / "here" / "blocks", 2_500_000_000)
    monkeypatch.delenv("SAE_BLOCK_CACHE")
    monkeypatch.delenv("SAE_BLOCK_CACHE_GB")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    blocks.blocks.cache_clear()
    assert (blocks.blocks().folder, blocks.blocks().limit) == (tmp_path / "sae" / "blocks", 100_000_000_000)
    for bad in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("SAE_BLOCK_CACHE_GB", bad)
        blocks.blocks.cache_clear()
        with pytest.raises(InputError, match=f"expected a number of GB, 0 or more, in SAE_BLOCK_CACHE_GB, got '{bad}'"):
            blocks.blocks()


def test_a_killed_process_leaves_whole_blocks(tmp_path):
    kept = Blocks(tmp_path, 1 << 30)
    if (child := os.fork()) == 0:
        for number in count():
            kept.put("a", number, block(number % 256))
    while not (tmp_path / "a" / "200").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    names = [path.name for path in (tmp_path / "a").iterdir() if path.name.isdecimal()]
    assert len(names) > 200
    assert all(kept.get("a", int(name), SIZE) == block(int(name) % 256) for name in names)
