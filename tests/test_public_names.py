"""What the packages promise to export, and that it works as the README shows it."""

import re
from pathlib import Path

import sae
import steering

ROOT = Path(__file__).resolve().parents[1]


def test_public_names():
    assert sorted(sae.__all__) == ["Bundle", "Dictionary", "InputError", "LanguageModel", "__version__", "load"]
    assert sorted(steering.__all__) == ["DictionaryFeature", "SteeringVector", "steered"]
    for package in (sae, steering):
        assert all(hasattr(package, name) for name in package.__all__)
        assert (Path(package.__file__).parent / "py.typed").exists()


def test_the_readmes_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) >= 2
