"""Whatever happens to a file: the command that opens it does its work or says in one sentence that it cannot, in little memory."""

import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from damage import damage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.activations.cache import ActivationCache
from sae.activations.cached import CachedSource
from sae.activations.describe import DescribeConfig, describe_cache
from sae.activations.export import ExportConfig as CacheExportConfig
from sae.activations.export import export_cache
from sae.activations.harvest.command import HarvestConfig, harvest
from sae.activations.imports.command import ImportConfig, import_activations
from sae.activations.text.documents import TextConfig, documents
from sae.dictionaries.dictionary import Dictionary
from sae.disk.writing import write_json, write_tensors
from sae.errors import InputError
from sae.evaluation import EvaluationConfig, evaluate
from sae.features.explanations.explain import ExplainConfig, explain
from sae.features.explanations.explanation import Explanation
from sae.features.explanations.judge import Log
from sae.features.exports.command import ExportConfig, export_features
from sae.features.exports.neuronpedia import read_neuronpedia, rewrite_neuronpedia
from sae.features.exports.saedashboard import read_saedashboard, rewrite_saedashboard
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.merge import MergeConfig, merge_indexes
from sae.features.index.reader import FeatureIndex
from sae.features.pages.feature import FeatureView
from sae.features.terminal import ListConfig, list_features
from sae.kinds import ReLU
from sae.model.language_model import LanguageModel
from sae.training import TrainingConfig, train
from steering.concept import load_concept
from steering.directions.targeted import Effects
from steering.vector import SteeringVector

MEMORY = 1 << 30
"""bytes that a command may ask for beyond what the process has; the largest file here has 3 MB"""


class Kind(NamedTuple):
    """Something on disk, which of its files are damaged, and the commands that open it: given its copy and an empty folder to write in."""

    folder: Path
    files: str
    commands: dict[str, Callable[[Path, Path], object]]


@pytest.fixture(scope="module")
def home(world, tmp_path_factory) -> Path:
    """One of everything, small."""
    home = tmp_path_factory.mktemp("damage")
    shutil.copy(world.model.parent / "text.jsonl", home / "text.jsonl")
    (home / "model").symlink_to(world.model)
    harvest(harvest_config(home, home / "cache"))
    train(training(home, home / "run"))
    assert (home / "run" / "training.json").exists()
    stop_at("sae.training.part.Part.finish", lambda: train(training(home, home / "stopped")))
    assert (home / "stopped" / "checkpoint.safetensors").exists()
    build_index(IndexConfig(cache=home / "cache", dictionary=world.dictionary_folder, out=home / "index", device="cpu"))
    explain(ExplainConfig(index=home / "index", features=(0, 1, 2)))
    scores = {"accuracy": 0.5, "contexts": 4, "answered": 4, "failed_requests": {}}
    trivial = {"always_no": {"accuracy": 0.5}, "always_yes": {"accuracy": 0.5}}
    Log(FeatureIndex.open(home / "index"), judge(home / "index")).add(Explanation(3, "model:m", "a", scores, trivial))
    for name in ("neuronpedia", "saedashboard", "circuit-tracer"):
        export_features(ExportConfig(index=home / "index", out=home / name, format=name))
    (home / "files").mkdir()
    tokens = {
        "ids": torch.arange(40, dtype=torch.int32),
        "document_starts": torch.tensor([0, 10, 40]),
        "document_label": torch.tensor([0, 1]),
    }
    write_tensors(home / "files" / "tokens.safetensors", tokens, {"label_names": '["a", "b"]'})
    SteeringVector({"resid_post.0": torch.ones(8), "resid_post.1": torch.ones(3, 8)}, {"method": "hand"}).save(
        home / "files" / "v.safetensors"
    )
    SteeringVector.at("resid_post.1", torch.ones(8)).to_gguf(home / "files" / "v.gguf", "gpt2")
    Effects(torch.ones(8, 5), torch.ones(5), "resid_post.0", {}).save(home / "files" / "effects.safetensors")
    write_tensors(home / "files" / "acts.safetensors", {"x": torch.ones(40, 4)})
    np.save(home / "files" / "acts.npy", np.ones((40, 4), np.float32))
    np.save(home / "files" / "ids.npy", np.arange(40))
    write_json(home / "files" / "concept.json", {"name": "c", "words": ["a", "b"], "prompt_pairs": [["x", "y"]], "label": None})
    write_json(home / "files" / "rows.json", [{"text": "a"}, {"text": "b"}])
    shutil.copy(home / "text.jsonl", home / "files" / "rows.jsonl")
    saelens_folder(home / "saelens")
    stop_at("sae.activations.harvest.command._manifest", lambda: harvest(harvest_config(home, home / "begun")))
    return home


def stop_at(function: str, work: Callable[[], object]) -> None:
    """Leaves on disk what there is when the work comes to a function."""

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, stop)
        with pytest.raises(Stop):
            work()


def harvest_config(home: Path, out: Path) -> HarvestConfig:
    text, model = (str(home / "text.jsonl"),), str((home / "model").resolve())
    return HarvestConfig(
        text=text, label_field="domain", out=out, model=model, sites=("resid_pre.0",), tokens=600, context=32, dtype="float32",
        held_out=0.5, device="cpu", shard_tokens=200, pool_tokens=400,
    )  # fmt: skip


def training(home: Path, out: Path) -> TrainingConfig:
    kind = ReLU(l1=(1.0,), resample_every=0)
    settings = dict(kind=kind, d_sae=8, steps=6, batch_size=64, log_every=2, checkpoint_every=2, device="cpu")
    return TrainingConfig(cache=home / "cache", out=out, **settings)


def saelens_folder(folder: Path) -> None:
    from datasets import Array2D, Dataset, Features, List, Value

    columns = {"blocks.0.hook_resid_post": np.ones((6, 5, 4), np.float32), "token_ids": np.ones((6, 5), np.int32)}
    features = Features({"blocks.0.hook_resid_post": Array2D((5, 4), "float32"), "token_ids": List(Value("int32"))})
    Dataset.from_dict(columns, features=features).save_to_disk(str(folder))


def read_cache(folder: Path, out: Path) -> None:
    cache = ActivationCache.open(folder)
    next(CachedSource(cache).batches(16))
    for split in ("train", "held_out"):
        for shard in cache.shards(split):
            cache.read(shard)
    cache.tokens.window(3, 2, 2)


def look(folder: Path, out: Path) -> None:
    index = FeatureIndex.open(folder)
    for j in range(0, index.d_sae, 7):
        FeatureView(index, j)._repr_html_()
        index.random_contexts(j, 3)
    index.search("the|it", 3)
    index.promotes("the", 3)
    index.token_features(5)


def kinds(world, home: Path) -> dict[str, Kind]:
    index, dictionary, files = home / "index", world.dictionary_folder, home / "files"

    def importing(name: str, **more: Path) -> Callable[[Path, Path], object]:
        def work(folder: Path, out: Path) -> object:
            given = {key: folder / value for key, value in more.items()}
            return import_activations(ImportConfig(source=(folder / name,), out=out / "c", site="resid_post.0", **given))

        return work

    def reading(name: str) -> Callable[[Path, Path], object]:
        return lambda folder, out: list(documents(TextConfig(text=(str(folder / name),))))

    def trained(folder: Path, out: Path) -> object:
        return train(training(home, folder))

    def evaluated(folder: Path, out: Path) -> object:
        return evaluate(EvaluationConfig(dictionary=folder, cache=home / "cache", sequences=0, out=out / "e.json", device="cpu"))

    return {
        "cache": Kind(
            home / "cache",
            "*",
            {
                "read": read_cache,
                "describe": lambda f, out: describe_cache(DescribeConfig(cache=f, rows=100)),
                "export": lambda f, out: export_cache(CacheExportConfig(cache=f, out=out / "d")),
                "evaluate": lambda f, out: evaluate(
                    EvaluationConfig(dictionary=dictionary, cache=f, sequences=3, out=out / "e.json", device="cpu")
                ),
                "index": lambda f, out: build_index(IndexConfig(cache=f, dictionary=dictionary, out=out / "i", device="cpu")),
            },
        ),
        "unfinished harvest": Kind(home / "begun", "*", {"harvest": lambda f, out: harvest(harvest_config(home, f))}),
        "index": Kind(
            index,
            "*",
            {
                "look": look,
                "list": lambda f, out: list_features(ListConfig(index=f, search="the", html=out / "p")),
                "explain": lambda f, out: explain(ExplainConfig(index=f, features=(0, 5))),
                "export": lambda f, out: export_features(ExportConfig(index=f, out=out / "x", features=(0, 5), processes=1)),
                "merge": lambda f, out: merge_indexes(MergeConfig(parts=(f, world.index.folder), out=out / "m")),
            },
        ),
        "dictionary": Kind(
            home / "run", "*", {"load": lambda f, out: Dictionary.load(f).encode(torch.zeros(1, 420)), "evaluate": evaluated}
        ),
        "finished run": Kind(home / "run", "training.json", {"train": trained}),
        "checkpoint": Kind(home / "stopped", "*", {"train": trained}),
        "answers": Kind(index, "answers.*", {"read": lambda f, out: Log(FeatureIndex.open(f), judge(f))}),
        "token file": Kind(files, "tokens.safetensors", {"read": reading("tokens.safetensors")}),
        "model": Kind(home / "model", "*.json", {"load": lambda f, out: LanguageModel.load(str(f), device="cpu").encode(["a"])}),
        "texts": Kind(files, "rows.json*", {"read": reading("rows.json*")}),
        "vector": Kind(files, "v.safetensors", {"load": lambda f, out: SteeringVector.load(f / "v.safetensors")}),
        "gguf": Kind(files, "v.gguf", {"load": lambda f, out: SteeringVector.from_gguf(f / "v.gguf")}),
        "effects": Kind(files, "effects.safetensors", {"load": lambda f, out: Effects.load(f / "effects.safetensors")}),
        "concept": Kind(files, "concept.json", {"load": lambda f, out: load_concept(str(f / "concept.json"))}),
        "arrays": Kind(files, "acts.safetensors", {"import": importing("acts.safetensors")}),
        "npy": Kind(files, "*.npy", {"import": importing("acts.npy", token_ids=Path("ids.npy"))}),
        "saelens": Kind(home / "saelens", "*", {"import": lambda f, out: import_activations(ImportConfig(source=(f,), out=out / "c"))}),
        "neuronpedia": Kind(home / "neuronpedia", "*", {"rewrite": lambda f, out: rewrite_neuronpedia(read_neuronpedia(f), out)}),
        "saedashboard": Kind(home / "saedashboard", "*", {"rewrite": lambda f, out: rewrite_saedashboard(read_saedashboard(f), out)}),
        "circuit-tracer": Kind(
            home / "circuit-tracer",
            "index.json.gz",
            {"export": lambda f, out: export_features(ExportConfig(index=index, out=f, format="circuit-tracer"))},
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def all_kinds(world, home) -> dict[str, Kind]:
    return kinds(world, home)


def judge(folder: Path) -> ExplainConfig:
    return ExplainConfig(index=folder, endpoint="http://127.0.0.1:1", judge_model="m")


@pytest.fixture
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(kind: Kind, command: str, seed: int, tmp: Path) -> tuple[str, str]:
    """What was damaged, and "works" or "refused"; fails on any other exception."""
    rng = random.Random(seed)
    folder, out = tmp / "copy", tmp / "out"
    for path in (folder, out):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(kind.folder, folder)
    out.mkdir()
    said = damage(rng.choice(sorted(path for path in folder.rglob(kind.files) if path.is_file())), rng) if seed >= 0 else "nothing"
    try:
        kind.commands[command](folder, out)
    except InputError as error:
        return said, "refused" if seed >= 0 and "\n" not in str(error) else str(error)
    except Exception as error:
        raise AssertionError(f"{command}, seed {seed}, {said}: {type(error).__name__}: {error}") from error
    return said, "works"


NAMES = [
    *("cache", "unfinished harvest", "index", "dictionary", "finished run", "checkpoint", "answers", "token file", "texts", "vector"),
    "model",
    *("gguf", "effects", "concept", "arrays", "npy", "saelens", "neuronpedia", "saedashboard", "circuit-tracer"),
]
QUICK = {"token file", "texts", "vector", "gguf", "effects", "concept", "answers"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("little_memory")
def test_a_damaged_file_is_read_or_refused(all_kinds, tmp_path, name):
    kind = all_kinds[name]
    for command in kind.commands:
        assert outcome(kind, command, -1, tmp_path) == ("nothing", "works")

    @settings(max_examples=40 if name in QUICK else 10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(command=st.sampled_from(sorted(kind.commands)), seed=st.integers(0, 2**32 - 1))
    def run(command, seed):
        assert outcome(kind, command, seed, tmp_path)[1] in ("works", "refused")

    run()


@pytest.mark.soak
@pytest.mark.usefixtures("little_memory")
def test_a_thousand_damaged_files(all_kinds, tmp_path, capsys):
    many = int(os.environ.get("DAMAGED", "70"))  # of each kind
    counts: Counter[tuple[str, str]] = Counter()
    failures = []
    for name, kind in all_kinds.items():
        for seed in range(many):
            command = sorted(kind.commands)[seed % len(kind.commands)]
            try:
                counts[name, outcome(kind, command, seed, tmp_path)[1]] += 1
            except AssertionError as error:
                failures.append(f"{name}: {str(error)[:300]}")
    with capsys.disabled():
        for name in all_kinds:
            print(f"{name}: {counts[name, 'works']} worked, {counts[name, 'refused']} refused")
        print("\n".join(failures))
    assert not failures
