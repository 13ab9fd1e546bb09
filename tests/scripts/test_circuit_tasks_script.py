"""docs/circuit_tasks.md: every task and corruption has a row, and the script writes rows between the marks alone."""

import re
from pathlib import Path

import pytest

from sae.errors import InputError
from steering.circuits.tasks.generators import TASKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import circuit_tasks

    return circuit_tasks


def test_the_page_has_every_task_and_corruption(script):
    text = script.PAGE.read_text(encoding="utf-8")
    measured = text.partition(script.START)[2].partition(script.END)[0]
    rows = [tuple(line.split("|")[1].strip().split(", ")) for line in measured.splitlines()[2:]]
    assert rows == [(task, corruption) for task in TASKS for corruption in TASKS[task].corruptions]
    told = dict(re.findall(r"^\| `([\w-]+)` \|[^|]*\|([^|]*)\|", text, flags=re.MULTILINE))
    assert {task: set(re.findall(r"`([\w-]+)`", said)) for task, said in told.items()} == {
        task: set(row.corruptions) for task, row in TASKS.items()
    }


def test_a_cell_says_what_was_measured(script):
    from steering.circuits.tasks.presence import Presence

    accuracy, effect = {"value": 0.5, "low": 0.25, "high": 0.75}, {"value": -1.0, "low": -2.0, "high": 0.5}
    assert script.cell(Presence(128, accuracy, effect, effect, effect)) == "50 % (25–75); −1.00 (−2.00 to 0.50)"
    there = Presence(64, accuracy | {"low": 0.51}, effect, effect, effect | {"low": 0.1})
    assert script.cell(there) == "**50 % (51–75); −1.00 (0.10 to 0.50); 64 pairs**"
    assert script.cell(None) == "no pair fits"


def test_only_the_table_is_replaced(script, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n" + script.START + "old\n" + script.END + "after\n")
    model = str(ROOT / "checkpoints" / "demo-lm")
    script.write_page(script.TasksConfig((model,), ("demo",), pairs=2, out=page))
    text = page.read_text()
    assert text.startswith("before\n" + script.START + "| task, corruption | demo |\n")
    assert text.endswith(script.END + "after\n")
    assert "old" not in text
    with pytest.raises(InputError, match="1 models and 2 names"):
        script.write_page(script.TasksConfig((model,), ("a", "b"), out=page))
    with pytest.raises(InputError, match="expected the lines"):
        script.write_page(script.TasksConfig((model,), ("a",), out=tmp_path / "absent.md"))
