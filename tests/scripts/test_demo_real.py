"""The demo of the real model without the model: its commands, what a resumed demo leaves out, what it refuses; all of it: `-m real`."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from sae.command_line import parse
from sae.errors import InputError
from steering.command_line import COMMANDS, settings_of

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
NUMBERS = {
    "reconstruction": {"fvu": 0.2, "l0": 30.0},
    "language_model": {"loss_recovered": 0.9, "loss_recovered_interval": [0.8, 1]},
}  # of an evaluation


@pytest.fixture
def demo_real(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("demo_real")


@pytest.fixture
def called(demo_real, monkeypatch):
    """The commands that the demo would run, one after another, as (script, flags)."""
    commands: list[tuple[str, str]] = []

    def call(script, flags, show=True, makes=None):
        commands.append((script, flags))
        if makes is not None and script == "evaluate_sae":
            makes.parent.mkdir()
            makes.write_text(json.dumps(NUMBERS))
        return "" if show else '[{"feature": 7}]'

    monkeypatch.setattr(demo_real, "call", call)
    return commands


def accepted(script, flags, monkeypatch):
    """The command's settings, read by the command's own parser."""
    (name,) = re.findall(r'main\("([\w-]+)"\)', (SCRIPTS / f"{script}.py").read_text())
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags)])
    return parse(settings_of(COMMANDS[name]), "")


def test_every_command_is_one_that_the_scripts_accept(demo_real, called, monkeypatch, tmp_path):
    demo_real.demo(demo_real.RealDemoConfig(out=tmp_path, word="it's"))
    assert called[0] == ("fetch_real_model", "")
    settings = {script: accepted(script, flags, monkeypatch) for script, flags in called[1:]}
    harvest, train, compare = settings["cache_activations"], settings["train_sae"], settings["compare_directions"]
    assert harvest.text == ("checkpoints/smollm2-text/tokens.safetensors",)
    assert (harvest.tokens, harvest.sites, harvest.max_norm_ratio) == (300_000, ("resid_post.15",), 10.0)
    assert train.cache == harvest.out == tmp_path / "train" / "cache"
    assert settings["list_features"].search == "it's"
    assert settings["steer"].feature == "7"
    assert (compare.feature, Path(compare.dictionary)) == (7, train.out)
    assert [script for script, _ in called].index("train_sae") < [script for script, _ in called].index("evaluate_sae")


def test_a_given_dictionary_is_not_trained_and_needs_fewer_tokens(demo_real, called, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_real, "SHIPPED", ROOT / "checkpoints" / "demo-sae")
    demo_real.demo(demo_real.RealDemoConfig(out=tmp_path, dictionary="shipped"))
    flags = dict(called)
    assert "train_sae" not in flags
    harvest = accepted("cache_activations", flags["cache_activations"], monkeypatch)
    assert (harvest.tokens, harvest.sites) == (60_000, ("resid_post.2",))  # the site that demo-sae names
    assert harvest.out == tmp_path / "shipped" / "cache"


def test_a_dictionary_that_is_not_there_is_refused_before_any_work(demo_real, called, tmp_path):
    with pytest.raises(InputError, match=r'expected --dictionary to be "train", "shipped" or a folder, got \'trian\''):
        demo_real.demo(demo_real.RealDemoConfig(out=tmp_path, dictionary="trian"))
    assert called == []


def test_what_is_there_is_not_made_again(demo_real, tmp_path, capsys):
    made = tmp_path / "made.json"
    made.write_text("{}")
    assert demo_real.call("evaluate_sae", "--dictionary none --cache none", makes=made) == ""  # run, it would end the demo
    said = capsys.readouterr().out
    assert "$ python scripts/evaluate_sae.py --dictionary none --cache none" in said
    assert f"skipped: {made}" in said


MAKES = {"evaluate_sae": "", "build_feature_index": "index.json", "compare_directions": "comparison.json"}


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """Stands for the scripts, each in a process of its own that makes its file; the one of `scripts["killed"]` kills itself before."""
    state: dict = {"killed": None, "started": []}
    real = subprocess.Popen

    def start(command, **options):
        script, flags = Path(command[1]).stem, command[2:]
        state["started"].append(script)
        made = Path(flags[flags.index("--out") + 1], MAKES[script]) if script in MAKES else tmp_path / "other" / script
        what = NUMBERS if script == "evaluate_sae" else [{"feature": 7}]
        code = f"import json, os, pathlib\npath = pathlib.Path({str(made)!r})\n"
        code += "os.kill(os.getpid(), 9)\n" if script == state["killed"] else ""
        code += f"path.parent.mkdir(parents=True, exist_ok=True)\npath.write_text(json.dumps({what}))\nprint(path.read_text())"
        return real([sys.executable, "-S", "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return state


@pytest.mark.parametrize("killed", ["cache_activations", "evaluate_sae", "build_feature_index", "steer", "compare_directions"])
def test_started_again_it_leaves_out_what_is_finished(demo_real, scripts, tmp_path, killed):
    config = demo_real.RealDemoConfig(out=tmp_path / "demo")
    scripts["killed"] = killed
    with pytest.raises(SystemExit) as end:
        demo_real.demo(config)
    assert end.value.code == 137
    before = scripts["started"].copy()
    assert before[-1] == killed
    scripts |= {"killed": None, "started": []}
    demo_real.demo(config)
    again = scripts["started"]
    assert again[-1] == "compare_directions"
    assert not {script for script in MAKES if script in before[:-1]} & set(again)
    assert set(before) | set(again) >= {"fetch_real_model", "cache_activations", "train_sae", "list_features", "steer", *MAKES}
    scripts["started"] = []
    demo_real.demo(config)  # of a finished one nothing is made again but what says itself that it is complete
    assert not MAKES.keys() & set(scripts["started"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_script_write_its_checkpoint(tmp_path, number):
    """Ctrl-C reaches both, as in a terminal; SIGTERM the demo alone."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, signal, sys, time\nstop = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n    signal.signal(number, lambda *_: stop.append(1))\n"
        "print('ready', flush=True)\nwhile not stop:\n    time.sleep(0.01)\n"
        f"time.sleep(0.6)\npathlib.Path({str(tmp_path / 'checkpoint')!r}).touch()\nsys.exit(130)\n"
    )
    named = f"demo.__file__ = {str(tmp_path / 'demo.py')!r}"  # where the script lies
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import demo; {named}; demo.call('slow', '')"
    command = [sys.executable, "-c", code]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    for line in run.stdout:
        if line == "ready\n":
            break
    os.killpg(run.pid, number) if number == signal.SIGINT else os.kill(run.pid, number)
    assert run.wait(30) in (130, -signal.SIGINT)
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.real
@pytest.mark.timeout(1200)
def test_the_whole_demo_with_a_given_dictionary(demo_real, tmp_path):
    if not (ROOT / demo_real.MODEL).is_dir():
        pytest.skip("no real model; run make real-model")
    demo_real.demo(demo_real.RealDemoConfig(out=tmp_path, dictionary="shipped"))
    assert (tmp_path / "shipped" / "comparison" / "report.html").exists()
