"""Standard output that nobody takes stops no work: closed from the start, closed by its reader, or a full disk."""

import os
import select
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from sae.command_line import run
from sae.errors import InputError
from sae.progress import progress

ROOT = Path(__file__).parents[1]
LINES = 300
FILL = "." * 300  # so that a pipe does not hold them all


@dataclass
class Config:
    out: Path
    fail: bool = False


def work(config: Config) -> None:
    with progress("work", LINES, "steps") as bar:
        for step in range(LINES):
            print("line", step, FILL)
            print("note", step, FILL, file=sys.stderr)
            bar.advance(1)
    if config.fail:
        raise InputError("expected more")
    config.out.write_text("done")  # opened late: it must not take a closed stream's number


def child(streams: dict[int, str], arguments: list[str], folder: Path) -> tuple[int, dict[int, str]]:
    """Runs the command in a child with each stream closed, full, without a reader, with one (or a terminal) that leaves, or in a file."""
    readers, kept = {}, {}
    ends = {}
    for number, state in streams.items():
        kept[number] = folder / str(number)
        if state in ("left", "leaves"):
            readers[number], ends[number] = os.pipe()
        elif state == "terminal":
            readers[number], ends[number] = os.openpty()
        elif state != "closed":
            ends[number] = os.open("/dev/full" if state == "full" else kept[number], os.O_RDWR | os.O_CREAT)
    if (pid := os.fork()) == 0:
        code = 1
        try:
            for reader in readers.values():
                os.close(reader)
            for number, name in ((1, "stdout"), (2, "stderr")):
                if number in ends:
                    os.dup2(ends[number], number)
                    stream = open(number, "w", closefd=False, encoding="utf-8")  # noqa: SIM115 (the child ends by _exit)
                else:
                    os.close(number)
                    stream = None
                setattr(sys, name, stream)
                setattr(sys, f"__{name}__", stream)
            sys.argv = ["command", *arguments]
            run(work, Config, "Some work.")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(code)
    for end in ends.values():
        os.close(end)
    waiting = [reader for number, reader in readers.items() if streams[number] != "left"]
    for reader in set(readers.values()) - set(waiting):
        os.close(reader)
    while waiting:
        for reader in select.select(waiting, [], [])[0]:
            with suppress(OSError):  # a terminal at its end
                os.read(reader, 10)
            os.close(reader)
            waiting.remove(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, {number: path.read_text() if path.exists() else "" for number, path in kept.items()}


@pytest.mark.parametrize("out", ["kept", "closed", "left", "leaves", "full", "terminal"])
@pytest.mark.parametrize("err", ["kept", "closed", "left", "leaves", "full", "terminal"])
def test_the_work_is_done(out, err, tmp_path):
    code, text = child({1: out, 2: err}, ["--out", str(tmp_path / "result")], tmp_path)
    assert (tmp_path / "result").read_text() == "done"
    assert code == (2 if out == "full" else 0)
    errors = [line for line in text[2].splitlines() if line.startswith("error: ")]
    assert len(errors) == (out == "full" and err == "kept")
    assert all("No space left" in line for line in errors)
    if out == "kept":
        assert [line.split()[1] for line in text[1].splitlines()] == [str(step) for step in range(LINES)]
    if err == "kept":
        assert [line.split()[1] for line in text[2].splitlines()[:LINES]] == [str(step) for step in range(LINES)]


@pytest.mark.parametrize("out", ["kept", "closed", "left", "full"])
def test_failures_keep_their_sentence_and_code(out, tmp_path):
    code, text = child({1: out, 2: "kept"}, ["--out", str(tmp_path / "result"), "--fail"], tmp_path)
    assert code == 2
    assert [line for line in text[2].splitlines() if line.startswith("error: ")] == ["error: expected more"]
    assert not (tmp_path / "result").exists()


def test_help_without_a_reader_and_an_empty_path(tmp_path):
    assert child({1: "left", 2: "kept"}, ["--help"], tmp_path) == (0, {1: "", 2: ""})
    code, text = child({1: "kept", 2: "kept"}, ["--out", ""], tmp_path)
    assert code == 2
    assert "empty" in text[1] + text[2]


@pytest.mark.parametrize(("line", "code"), [("COMMAND | head -1", 0), ("COMMAND >&- 2>&- <&-", 0), ("COMMAND >/dev/full", 2)])
def test_a_real_command_in_a_real_shell(line, code):
    command = f"'{sys.executable}' scripts/list_features.py --help"
    done = subprocess.run(
        ["bash", "-c", line.replace("COMMAND", command) + "; exit ${PIPESTATUS[0]}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
