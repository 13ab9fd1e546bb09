"""The notebooks of examples/ run from their first cell to their last, here on small inputs."""

import ast
import json
import re
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "look_at_a_dictionary": {"TOKENS": 20_000},
    "train_a_dictionary": {"TOKENS": 20_000, "D_SAE": 64, "STEPS": 16},
    "compare_directions": {"PROMPTS": 4, "SAMPLES": 1, "NEW_TOKENS": 4},
}


def run(source, namespace):
    """Runs a cell; the value of its last line, if that is an expression, is shown as a notebook shows it."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), namespace)
    if last is not None:
        value = eval(compile(last, "<cell>", "eval"), namespace)
        return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)
    return None


def test_every_notebook_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_notebook(name, tmp_path, monkeypatch, capsys):
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(EXAMPLES)
    matplotlib.use("Agg")
    namespace, shown = {}, []
    for cell in cells:
        if cell["cell_type"] == "code":
            shown.append(run("".join(cell["source"]), namespace))
            if "parameters" in cell["metadata"].get("tags", ()):
                assert set(SMALL[name]) < set(namespace), "a parameter has another name in the notebook"
                namespace |= SMALL[name] | {"OUT": str(tmp_path)}
    said = capsys.readouterr().out
    if name == "look_at_a_dictionary":
        assert " 3586   precision" in said
        assert any(value and value.startswith("<iframe") for value in shown)
    elif name == "train_a_dictionary":
        by_autograd, by_package = map(float, re.search(r"loss ([\d.]+) by autograd, ([\d.]+) by the package", said).groups())
        assert by_autograd == pytest.approx(by_package, rel=1e-4)
    else:
        assert namespace["strengths"]["random"].kl == pytest.approx(0.3, rel=0.05)
        assert (tmp_path / "report.html").exists()
