"""The commands of `sae`: flags from a dataclass, one call, one-sentence errors. `scripts/` and the console commands both come here."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sae.disk.places import sentence
from sae.errors import InputError
from sae.streams import lasting_streams
from sae.text_input import replace_surrogates


def run(function: Callable[[Any], Any], config_class: type, description: str) -> None:
    """Parses the command line into `config_class` and calls `function` with it.

    Exit codes: 0 done, 2 unusable input or a place that cannot be written (one sentence on stderr), 130 interrupted. A reader of
    standard output that leaves early, as `head` does, changes neither the work nor the code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr never fails on a character as it is
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character of the text shows "?"
    with lasting_streams():
        try:
            function(parse(config_class, description))
        except InputError as error:
            fail(str(error))
        except OSError as error:
            text = sentence(error)
            if text is None:
                raise
            fail(text)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)


def fail(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def parse(config_class: type, description: str) -> Any:
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    _check_encoding(sys.argv[1:])
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def path(info: Any) -> Any:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(1, "PATH", _path, lambda value: isinstance(value, Path), lambda value: [str(value)])

    with registry:
        return tyro.cli(config_class, description=description)


def _check_encoding(arguments: list[str]) -> None:
    """Bytes that Python could not decode would fail only where they are printed or written, hours later perhaps."""
    for argument in arguments:
        if replace_surrogates(argument)[1]:
            raise InputError(
                f"expected arguments in {sys.getfilesystemencoding()}, got {argument!a}; write it in that encoding, or rename the file"
            )


def _path(arguments: list[str]) -> Path:
    if not arguments[0]:  # from an unset variable of the shell; for Python it would be the present folder
        raise ValueError("expected a path, got an empty text")
    return Path(arguments[0])


def cache_activations() -> None:
    from sae.activations.harvest import HarvestConfig, harvest

    run(harvest, HarvestConfig, "Record a language model's activations on text and store them, shuffled, in a cache.")


def import_activations() -> None:
    from sae.activations.imports import ImportConfig, import_activations

    run(import_activations, ImportConfig, "Copy activations of SAELens, or plain arrays, into an activation cache.")


def describe_cache() -> None:
    from sae.activations.describe import DescribeConfig, describe_cache

    run(describe_cache, DescribeConfig, "What an activation cache holds: text, norms, outlier dimensions, massive activations.")


def export_cache() -> None:
    from sae.activations.export import ExportConfig, export_cache

    run(export_cache, ExportConfig, "Write a cache's activations with their tokens as a folder of the datasets library.")


def train_sae() -> None:
    from sae.training import TrainingConfig, train

    run(train, TrainingConfig, "Train one or several dictionaries on an activation cache.")


def train_sae_live() -> None:
    from sae.training.live import LiveTrainingConfig, train_live

    run(train_live, LiveTrainingConfig, "Train on activations that the model computes as they are needed, without a cache.")


def evaluate_sae() -> None:
    from sae.evaluation import EvaluationConfig, evaluate

    run(evaluate, EvaluationConfig, "Measure a dictionary on held-out tokens: reconstruction, sparsity, the model's loss.")


def build_feature_index() -> None:
    from sae.features.index.build import IndexConfig, build_index

    run(
        build_index,
        IndexConfig,
        "One pass over a cache: every feature's activations, statistics and logit lens, in one folder.",
    )


def merge_feature_indexes() -> None:
    from sae.features.index.merge import MergeConfig, merge_indexes

    run(merge_indexes, MergeConfig, "Join feature indexes of one dictionary that were built on different text.")


def list_features() -> None:
    from sae.features.terminal import ListConfig, list_features

    run(list_features, ListConfig, "List and search features in the terminal and write pages that open without a network.")


def explain_features() -> None:
    from sae.features.explanations.explain import ExplainConfig, explain

    run(explain, ExplainConfig, "Explain features by tokens, bigrams and patterns, or by a model, and score that on held-out documents.")


def export_features() -> None:
    from sae.features.exports.command import ExportConfig, export_features

    run(
        export_features,
        ExportConfig,
        "Write features as a folder that opens from file://, or for Neuronpedia, SAEDashboard, circuit-tracer.",
    )
