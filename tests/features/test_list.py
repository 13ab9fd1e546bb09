"""The command of the terminal: what it prints, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae.errors import InputError
from sae.features.terminal import ListConfig, list_features


def output(world, capsys, **flags) -> str:
    list_features(ListConfig(index=world.index.folder, **flags))
    return capsys.readouterr().out


@pytest.mark.parametrize("column", ["density", "max", "count"])
def test_list_is_in_falling_order(world, capsys, column):
    listed = json.loads(output(world, capsys, list=column, json=True, top=40))
    values = [entry[column] for entry in listed]
    assert values == sorted(world.index.columns[column].tolist(), reverse=True)


def test_without_a_flag_features_are_listed_by_maximum(world, capsys):
    assert output(world, capsys, json=True) == output(world, capsys, list="max", json=True)


def test_search_lists_the_hits_and_writes_their_pages(world, capsys, tmp_path):
    listed = json.loads(output(world, capsys, search="zebrafly", json=True, top=3, html=tmp_path / "pages"))
    assert [entry["feature"] for entry in listed] == [hit.feature for hit in world.index.search("zebrafly", 3)]
    assert listed[0]["score"] == world.index.search("zebrafly", 1)[0].score
    written = {path.name for path in (tmp_path / "pages").iterdir()}
    assert written == {"index.html"} | {f"{entry['feature']}.html" for entry in listed}


def test_the_table_and_the_single_feature_are_text_not_markup(world, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    table = output(world, capsys, promotes="the", top=3)
    assert table.startswith("Features that promote the")
    shown = output(world, capsys, feature=(4,), top=30)
    assert "<script>" in shown
    assert "Random activations" in shown
    assert "↵" in shown


def test_random_is_repeatable_and_alive(world, capsys):
    first, again = (output(world, capsys, random=True, top=5, seed=1, json=True) for _ in range(2))
    assert first == again != output(world, capsys, random=True, top=5, seed=2, json=True)
    assert all(entry["count"] > 0 for entry in json.loads(output(world, capsys, random=True, top=40, json=True)))


def test_several_features_are_listed_in_the_order_given(world, capsys):
    assert [entry["feature"] for entry in json.loads(output(world, capsys, feature=(9, 3, 5), json=True))] == [9, 3, 5]


@pytest.mark.parametrize(
    "flags",
    [
        {"search": "x", "random": True},
        {"feature": (40,)},
        {"feature": (-1,)},
        {"search": "quokka"},
        {"search": ""},
        {"top": 0},
    ],
)
def test_unusable_input_is_refused(world, flags):
    with pytest.raises(InputError):
        list_features(ListConfig(index=world.index.folder, **flags))


def test_a_folder_that_is_no_index_is_refused(tmp_path):
    with pytest.raises(InputError, match="feature index"):
        list_features(ListConfig(index=tmp_path))


@pytest.mark.parametrize("flags", [["--list", "max"], ["--feature", "4"], ["--list", "max", "--json"]])
def test_a_terminal_of_ascii_alone_shows_what_it_can(world, flags):
    script = Path(__file__).parents[2] / "scripts" / "list_features.py"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "160"}
    done = subprocess.run([sys.executable, script, "--index", world.index.folder, *flags], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode("ascii")
    if "--json" in flags:  # which loses nothing
        first = json.loads(shown)[0]
        assert first["contexts"][0]["tokens"] == world.index.top_contexts(first["feature"], 1)[0].texts
    else:
        assert "?" in shown  # such as the mark of a line's end
