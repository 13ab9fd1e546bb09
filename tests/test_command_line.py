"""The commands: every one explains itself, errors are one sentence and exit code 2, and scripts equal console commands."""

import os
import re
import runpy
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from sae.activations.harvest.command import HarvestConfig
from sae.command_line import parse
from steering.command_line import COMMANDS, main

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p for p in (ROOT / "scripts").glob("*.py") if "__main__" in p.read_text())  # not tiny_models.py, a part of one


def run(*command, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd)


def run_here(script, *flags, monkeypatch, capsys):
    """A script in this process, which has the libraries loaded already; returns exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", [str(script), *flags])
    monkeypatch.syspath_prepend(str(script.parent))  # as Python does for a script
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


OTHERS = [path for path in SCRIPTS if path.stem == "train_sae" or 'main("' not in path.read_text()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sae", name, "--help"])
    with suppress(SystemExit):
        main()
    said = capsys.readouterr().out
    assert f"usage: sae {name}" in said
    assert " ".join(COMMANDS[name].summary.split()[:3]) in said
    assert not re.search(r"default: (None)?\)|\{None\}", re.sub(r"[\s│]+", " ", said))


def test_what_is_not_given_by_default_may_be_given_as_none(monkeypatch):
    given = "--sites resid_post.2 --out runs/cache --max-norm-ratio None --context None --label-field domain --quantize None"
    monkeypatch.setattr(sys, "argv", ["sae", *given.split()])
    settings = parse(HarvestConfig, "")
    assert (settings.max_norm_ratio, settings.context, settings.label_field, settings.quantize) == (None, None, "domain", None)
    monkeypatch.setattr(sys, "argv", ["sae", "--out", "runs/cache", "--context", "many"])
    with pytest.raises(SystemExit):
        parse(HarvestConfig, "")


@pytest.mark.parametrize("script", OTHERS, ids=lambda p: p.stem)
def test_every_other_script_prints_help(script, monkeypatch, capsys):
    code, said, complained = run_here(script, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, complained
    assert "usage" in said.lower()


def test_every_command_has_a_script_and_every_script_its_command():
    called = [name for path in SCRIPTS for name in re.findall(r'^    main\("([\w-]+)"\)$', path.read_text(), re.MULTILINE)]
    assert sorted([*called, "completion"]) == sorted(COMMANDS)  # completion is of the command sae alone


def test_the_console_command_knows_its_subcommands():
    done = run("-c", "import sys; from steering.command_line import main; main()", "--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout and command.summary in done.stdout for name, command in COMMANDS.items())
    done = run("-c", "from steering.command_line import main; main()", "trian")
    assert done.returncode == 2
    assert "did you mean train?" in done.stderr
    done = run("-c", "from steering.command_line import main; main()", "train", "--help")
    assert "usage: sae train" in done.stdout


COMPLETE = """
source "$1"
COMP_WORDS=(sae "${@:2}") COMP_CWORD=$(($# - 1))
$(complete -p sae | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_completion(tmp_path_factory):
    done = run("-c", "from steering.command_line import main; main()", "completion", "--shell", "bash")
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "sae.bash"
    path.write_text(done.stdout)
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ([""], COMMANDS),
        (["co"], ["compare", "completion"]),
        (["train", "relu", "--l1-"], ["--l1-warmup"]),
        (["train", "relu", "--lr", "1e-3", "--backend", "t"], ["triton"]),
        (["completion", "--shell", ""], ["bash", "zsh", "fish"]),
        (["browse", "--index", "READ"], ["README.md"]),
    ],
    ids=" ".join,
)
def test_bash_completes_commands_flags_choices_and_files(typed, offered, bash_completion):
    done = subprocess.run(["bash", "-c", COMPLETE, "bash", bash_completion, *typed], capture_output=True, text=True, cwd=ROOT)
    assert set(offered) <= set(done.stdout.split()), done.stderr
    assert all(word.startswith(typed[-1]) for word in done.stdout.split())


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("cache_activations", "--text nowhere.txt --sites resid_post.0 --out {tmp}/c", "nowhere.txt"),
        ("train_sae", "relu --cache {tmp}/none --out {tmp}/d", "does not exist"),
        ("train_sae_live", "relu --out {tmp}/d --live.sites resid_post.0 --live.text nowhere.txt", "nowhere.txt"),
        ("import_activations", "--source {tmp}/none.npy --out {tmp}/c", "does not exist"),
        ("describe_cache", "--cache {tmp}/none", "does not exist"),
        ("export_cache", "--cache {tmp}/none --out {tmp}/e", "does not exist"),
        ("evaluate_sae", "--dictionary {tmp}/none --cache {tmp}/none", "does not exist"),
        ("build_feature_index", "--dictionary {tmp}/none --cache {tmp}/none --out {tmp}/i", "does not exist"),
        ("merge_feature_indexes", "--parts {tmp}/one {tmp}/two --out {tmp}/i", "does not exist"),
        ("list_features", "--index {tmp}/none --list max", "none"),
        ("export_features", "--index {tmp}/none --out {tmp}/e", "none"),
        ("browse_features", "--index {tmp}/none --no-open", "none"),
        ("steer", "--index {tmp}/none --feature 1", "none"),
        ("measure_steering", "--index {tmp}/none", "either --feature or --search"),
        ("train_demo_model", "--corpora {tmp} --out {tmp}/m", "--corpora"),
    ],
)
def test_unusable_input_is_one_sentence_and_exit_code_2(script, flags, message, tmp_path, monkeypatch, capsys):
    path, words = ROOT / "scripts" / f"{script}.py", flags.format(tmp=tmp_path).split()
    if script == "train_sae":  # one of them as its own process
        done = run(path, *words)
        code, complained = done.returncode, done.stderr
    else:
        code, _, complained = run_here(path, *words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "Traceback" not in complained
    (error,) = [line for line in complained.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


ODD = "größe ‖x‖² — “quoted” 日本 😀"
PRINTING = f"""
import sys
from dataclasses import dataclass
from sae.command_line import run
@dataclass
class Config:
    "nothing"
def printing(_config):
    from rich.console import Console
    from rich.table import Table
    table = Table(title={ODD!r})
    table.add_row({ODD!r})
    Console(width=80).print(table)
    print({ODD!r})
    print({ODD!r}, file=sys.stderr)
run(printing, Config, {ODD!r})
"""


@pytest.mark.parametrize(
    ("encoding", "flags"), [("latin-1", []), ("ascii", []), ("cp1252", []), ("ascii", ["--help"]), ("ascii", ["--unknown"])]
)
def test_a_terminal_that_cannot_show_a_character_shows_another(encoding, flags):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PRINTING, *flags], capture_output=True, env=environment)
    assert done.returncode == (2 if flags == ["--unknown"] else 0), done.stderr
    assert b"Traceback" not in done.stderr
    shown = ODD.encode(encoding, "replace").decode(encoding)
    assert shown in done.stdout.decode(encoding) or flags == ["--unknown"]
    if not flags:
        assert done.stdout.decode(encoding).count(shown) == 3
        assert done.stderr.decode(encoding).strip() == ODD.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("flags", [["--prompt", b"caf\xe9", "--index", "x"], ["--index", b"caf\xe9"]])
def test_an_argument_that_cannot_be_decoded_is_one_sentence(flags):
    done = subprocess.run([sys.executable, ROOT / "scripts" / "steer.py", *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(r"error: expected arguments in utf-8, got 'caf\udce9'")
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_flag_is_refused():
    done = run(ROOT / "scripts" / "train_sae.py", "relu", "--cache", "x", "--out", "y", "--learning-rate", "1")
    assert done.returncode == 2
    assert "learning-rate" in done.stderr + done.stdout
