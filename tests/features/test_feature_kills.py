"""Killed at changes to files and started again, a command leaves what an uninterrupted one does, and nothing beside it."""

import random
import shutil

import pytest
from kills import changes, contents, killed, limited

from sae.activations.export import ExportConfig as CacheExportConfig
from sae.activations.export import export_cache
from sae.activations.imports.command import ImportConfig, import_activations
from sae.disk.arrays import EXPLANATIONS
from sae.evaluation import EvaluationConfig, evaluate
from sae.features.explanations.explain import ExplainConfig, explain
from sae.features.exports.command import ExportConfig, export_features
from sae.features.index.build import IndexConfig, build_index
from sae.features.index.merge import MergeConfig, merge_indexes
from sae.features.terminal import ListConfig, list_features

FORMATS = ("static", "neuronpedia", "neuronpedia-upload", "saedashboard", "circuit-tracer")


def commands(world, tmp):
    """Each writes into `tmp`/out and the like; some into a copy of the index, `tmp`/index."""
    import numpy as np

    index, out = world.index.folder, tmp / "out"
    np.save(tmp / "rows.npy", np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32))
    shutil.copytree(index, tmp / "index")
    features = tuple(range(12))
    known = {
        f"export {form}": lambda form=form: export_features(
            ExportConfig(
                index=index,
                out=out,
                format=form,
                **({} if form == "circuit-tracer" else {"features": features}),
                **({"processes": 1} if form == "static" else {}),
            )
        )
        for form in FORMATS
    }
    return known | {
        "explain": lambda: explain(ExplainConfig(index=tmp / "index", features=(1, 2, 7))),
        "list": lambda: list_features(ListConfig(index=index, feature=(1, 2, 7), html=out)),
        "index": lambda: build_index(
            IndexConfig(cache=world.cache, dictionary=world.dictionary_folder, out=out, device="cpu", tokens=1000)
        ),
        "export of a cache": lambda: out.exists() or export_cache(CacheExportConfig(cache=world.cache, out=out)),
        "import": lambda: import_activations(ImportConfig(source=(tmp / "rows.npy",), out=out, site="resid_pre.0")),
        "evaluation": lambda: evaluate(
            EvaluationConfig(dictionary=world.dictionary_folder, cache=world.cache, sequences=0, out=out / "e.json", device="cpu")
        ),
        "merge": lambda: merge_indexes(MergeConfig(parts=(tmp / "one", tmp / "two"), out=out)),
    }


NAMES = (*(f"export {form}" for form in FORMATS), "explain", "list", "index", "export of a cache", "import", "evaluation", "merge")


def prepared(world, tmp, name):
    if name == "merge":
        for part, folder in (("1/2", "one"), ("2/2", "two")):
            build_index(IndexConfig(cache=world.cache, dictionary=world.dictionary_folder, out=tmp / folder, device="cpu", part=part))
    return commands(world, tmp)[name]


def check(world, tmp, name, moments_of):
    """Onto nothing, and onto what an earlier run left."""
    work = prepared(world, tmp, name)
    before = set(tmp.iterdir())
    first = changes(work, tmp)
    whole = contents(tmp)
    again = changes(work, tmp)
    assert contents(tmp) == whole
    for anew, last in ((True, first), (False, again)):
        for moment in moments_of(last):
            if anew:
                for path in set(tmp.iterdir()) - before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                (tmp / "index" / EXPLANATIONS).unlink(missing_ok=True)
            assert killed(work, moment, tmp)
            work()
            assert contents(tmp) == whole, (name, moment, last)


@pytest.mark.parametrize("name", NAMES)
def test_a_kill_now_and_then(world, tmp_path, name):
    chance = random.Random(name)
    check(world, tmp_path, name, lambda last: sorted({last, max(1, last - 1), *chance.choices(range(1, last + 1), k=2)}) if last else [])


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_a_kill_at_every_change(world, tmp_path, name):
    check(world, tmp_path, name, lambda last: range(1, last + 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_of_the_files_size_is_a_sentence_and_costs_nothing(world, tmp_path, name):
    """In the middle of the work, at several sizes; then the same command without the limit."""
    work = prepared(world, tmp_path, name)
    before, refused = contents(tmp_path), 0
    for limit in (0, 500, 5000, 50_000):
        code = limited(work, limit)
        assert code in (0, 2), (name, limit)
        refused += code == 2
        if code == 2:
            left = contents(tmp_path)
            assert {path: left[path] for path in before} == before
            assert not [path for path in left if path.endswith((".tmp", ".box"))]
    assert refused
    work()
