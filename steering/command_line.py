"""The command `sae` and its subcommands, one row each; the files of `scripts/` call the same rows.

A new command is a row here and a file in scripts/. What a row names is imported only when the command runs.
"""

import difflib
import sys
from dataclasses import dataclass, make_dataclass
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any, Literal, NamedTuple

from sae.command_line import fail, parse, run


class Command(NamedTuple):
    function: str
    """module:name; it is called with the settings"""
    settings: str
    """module:name of the dataclass whose fields are the flags"""
    summary: str
    kinds: bool = False
    """the first word is a kind of dictionary, whose own options are flags too"""


COMMANDS = {
    "cache": Command(
        "sae.activations.harvest.command:harvest",
        "sae.activations.harvest.command:HarvestConfig",
        "Record a language model's activations on text and store them, shuffled, in a cache.",
    ),
    "import": Command(
        "sae.activations.imports.command:import_activations",
        "sae.activations.imports.command:ImportConfig",
        "Copy activations of SAELens, or plain arrays, into an activation cache.",
    ),
    "import-dictionary": Command(
        "sae.dictionaries.importing:import_dictionary",
        "sae.dictionaries.importing:ImportConfig",
        "Copy a dictionary of any format, from a folder or the hub, into a folder of SAELens' layout.",
    ),
    "describe": Command(
        "sae.activations.describe:describe_cache",
        "sae.activations.describe:DescribeConfig",
        "Show what an activation cache holds: text, norms, outlier dimensions, massive activations.",
    ),
    "export-cache": Command(
        "sae.activations.export:export_cache",
        "sae.activations.export:ExportConfig",
        "Write a cache's activations with their tokens as a folder of the datasets library.",
    ),
    "train": Command(
        "sae.training:train",
        "sae.training:TrainingConfig",
        "Train one or several dictionaries on an activation cache.",
        kinds=True,
    ),
    "train-live": Command(
        "sae.training.live:train_live",
        "sae.training.live:LiveTrainingConfig",
        "Train on activations that the model computes as they are needed, without a cache.",
        kinds=True,
    ),
    "train-plan": Command(
        "sae.training.plan:train_plan",
        "sae.training.plan:PlanConfig",
        "Train dictionaries of several kinds, widths, seeds and sites together, on one pass over a cache.",
    ),
    "evaluate": Command(
        "sae.evaluation:evaluate",
        "sae.evaluation:EvaluationConfig",
        "Measure a dictionary on held-out tokens: reconstruction, sparsity, the model's loss.",
    ),
    "check-dictionary": Command(
        "sae.evaluation.check.check:command",
        "sae.evaluation.check.check:CheckConfig",
        "Measure a dictionary on a short text, compare with what its source states, and find the frame that fits.",
    ),
    "index": Command(
        "sae.features.index.build:build_index",
        "sae.features.index.build:IndexConfig",
        "Read a cache once and write every feature's activations, statistics and logit lens into one folder.",
    ),
    "diff-models": Command(
        "sae.features.model_diff.command:diff_models",
        "sae.features.model_diff.command:DiffConfig",
        "Compare two models by a crosscoder of both: relative norms, latent scaling, examples, as JSON and a page.",
    ),
    "merge": Command(
        "sae.features.index.merge:merge_indexes",
        "sae.features.index.merge:MergeConfig",
        "Join feature indexes of one dictionary that were built on different text.",
    ),
    "list": Command(
        "sae.features.terminal:list_features",
        "sae.features.terminal:ListConfig",
        "List and search features in the terminal and write pages that open without a network.",
    ),
    "explain": Command(
        "sae.features.explanations.explain:explain",
        "sae.features.explanations.explain:ExplainConfig",
        "Explain features by tokens, bigrams and patterns, or by a model, and score the explanations on held-out documents.",
    ),
    "export": Command(
        "sae.features.exports.command:export_features",
        "sae.features.exports.command:ExportConfig",
        "Write features as a folder that opens from file://, or for Neuronpedia, SAEDashboard, circuit-tracer.",
    ),
    "export-transcoders": Command(
        "sae.features.exports.transcoders:export_transcoders",
        "sae.features.exports.transcoders:TranscodersConfig",
        "Write per-layer transcoders as the folder that circuit-tracer opens.",
    ),
    "browse": Command(
        "steering.panel:browse",
        "sae.features.browser.serve:BrowseConfig",
        "Look at features in the web browser: search, prompts, steering, labels; served on this machine alone.",
    ),
    "steer": Command(
        "steering.steer:steer",
        "steering.steer:SteerConfig",
        "Print a model's continuation of a prompt without and with a feature added.",
    ),
    "measure": Command(
        "steering.studies.strengths:strengths",
        "steering.studies.strengths:StrengthsConfig",
        "Measure what adding a feature does at several strengths, against a random direction.",
    ),
    "compare": Command(
        "steering.compare.command:compare_directions",
        "steering.compare.command:CompareConfig",
        "Compare ways to steer towards a concept at equal KL, with controls and intervals.",
    ),
    "principal": Command(
        "steering.studies.principal:principal_study",
        "steering.studies.principal:PrincipalConfig",
        "Test whether principal directions mean anything: compare them with random and learned ones at equal KL.",
    ),
    "effects": Command(
        "steering.studies.effect_map:effect_map",
        "steering.studies.effect_map:EffectConfig",
        "Measure what else steering with a feature changes, and find a direction that changes this feature alone.",
    ),
    "diagnose-breakdown": Command(
        "steering.breakdown.command:diagnose_breakdown",
        "steering.breakdown.command:BreakdownConfig",
        "Find why a too large coefficient breaks the model: one direction at rising strengths, in arms that separate the causes.",
    ),
    "study-breakdown": Command(
        "steering.breakdown.study:study",
        "steering.breakdown.study:StudyConfig",
        "Find what breaks a model along many directions: features, differences of means, principal and random ones, at several layers.",
    ),
    "find-circuit": Command(
        "steering.circuits.features.command:find",
        "steering.circuits.features.command:FindCircuitConfig",
        "Find which edges of a model, or features of dictionaries, do a task: scores, a circuit, its quality on held-out pairs.",
    ),
    "draw-circuit": Command(
        "steering.circuits.pages.command:draw_circuit",
        "steering.circuits.pages.command:DrawConfig",
        "Draw a circuit's file as a page with filters that opens without a network.",
    ),
    "steer-circuit": Command(
        "steering.circuits.steering_nodes.command:steer_circuit",
        "steering.circuits.steering_nodes.command:SteerCircuitConfig",
        "Steer at a circuit's nodes (heads, queries, keys, values) and compare with the whole stream and random heads at equal KL.",
    ),
    "attribute": Command(
        "steering.circuits.attribution.command:attribute",
        "steering.circuits.attribution.command:AttributeConfig",
        "Make the attribution graph of a prompt: which transcoder features make the next token likely, and through which others.",
    ),
    "intervene": Command(
        "steering.circuits.attribution.command:intervene",
        "steering.circuits.attribution.command:InterveneConfig",
        "Set a node of an attribution graph to multiples of its value and compare the outcome with the graph's prediction.",
    ),
    "browse-graph": Command(
        "steering.circuits.attribution.serve:browse_graph",
        "steering.circuits.attribution.serve:BrowseGraphConfig",
        "Serve an attribution graph's page together with its model: check any edge by an intervention.",
    ),
    "completion": Command(
        "steering.command_line:print_completion",
        "steering.command_line:CompletionConfig",
        "Print a script for the shell that completes commands, flags and their choices.",
    ),
}


@dataclass
class CompletionConfig:
    shell: Literal["bash", "zsh", "fish"]
    """Shell that will read the script."""


def print_completion(config: CompletionConfig) -> None:
    """Prints tyro's script for the settings of all commands. The script contains their flags; it runs Python, but not this package."""
    import tyro

    commands: list[Any] = [
        Annotated[settings_of(row), tyro.conf.subcommand(name, description=row.summary)] for name, row in COMMANDS.items()
    ]
    sys.argv = ["sae", "--tyro-print-completion", config.shell]
    parse(reduce(or_, commands), "")  # prints and exits


def settings_of(command: Command) -> Any:
    """The dataclass of a command's flags. For a command with kinds: a union of one dataclass per kind, whose first word is the kind."""
    import tyro

    settings = _named(command.settings)
    if not command.kinds:
        return settings
    kinds = [
        Annotated[with_kind(settings, kind), tyro.conf.subcommand(name, prefix_name=False)]
        for name, kind in _named("sae.kinds:KINDS").items()
    ]
    return reduce(or_, kinds)


def main(name: str | None = None) -> None:
    """Runs the command `name`, by default the first word of the command line. Exit codes: see `sae.command_line.run`."""
    if name is None:
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            print(overview())
            return
        name = sys.argv.pop(1)
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            fail(f"expected one of the commands {', '.join(COMMANDS)}, got {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        sys.argv[0] = f"sae {name}"
    command = COMMANDS[name]
    settings, summary = _named(command.settings), command.summary
    if command.kinds:
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            print(kinds_overview(name, summary))
            return
        kinds = _named("sae.kinds:KINDS")
        kind = sys.argv.pop(1)
        if kind not in kinds:
            fail(f"expected a kind of dictionary after {sys.argv[0]}, one of {', '.join(kinds)}, got {kind!r}")
        settings, summary = with_kind(settings, kinds[kind]), " ".join(kinds[kind].__doc__.split())
        sys.argv[0] += f" {kind}"
    run(_named(command.function), settings, summary)


def with_kind(settings: type, kind: type) -> type:
    """The settings with this kind's options as flags beside the others."""
    import tyro

    own: Any = Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    return make_dataclass(settings.__name__, [("kind", own)], bases=(settings,), kw_only=True)  # type: ignore[misc]


def kinds_overview(name: str, summary: str) -> str:
    rows = [f"  {kind:<14}{' '.join((one.__doc__ or '').split())}" for kind, one in _named("sae.kinds:KINDS").items()]
    usage = f"usage: sae {name} KIND [flags]; sae {name} KIND --help lists its flags"
    return "\n".join([usage, "", summary, "", *rows])


def overview() -> str:
    rows = [f"  {name:<20}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: sae COMMAND [flags]; sae COMMAND --help lists its flags", "", *rows])


def _named(target: str) -> Any:
    module, name = target.split(":")
    return getattr(import_module(module), name)
