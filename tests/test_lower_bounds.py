"""constraints-lowest.txt pins every dependency at the lower bound that pyproject.toml declares."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_dependency_is_pinned_at_its_lower_bound():
    text = (ROOT / "pyproject.toml").read_text()
    declared = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text.split("dependencies = [")[1].split("]")[0]))
    declared |= dict(re.findall(r'"([\w-]+)>=([\d.]+)"', re.search(r"^gguf = .*$", text, re.MULTILINE).group()))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE))
    assert len(declared) > 15
    assert {name: pins.get(name, "").split(".")[: bound.count(".") + 1] for name, bound in declared.items()} == {
        name: bound.split(".") for name, bound in declared.items()
    }
