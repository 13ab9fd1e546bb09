"""The fair comparison of directions: one site, the same prompts and seeds, strengths set by equal KL on neutral text, chosen on one half of
the prompts and scored on the other, with intervals, controls and every continuation kept.

s texts (prompts times samples) · d width of the site
"""

import math
import shlex
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tyro.conf import OmitArgPrefixes

from sae.activations.text.documents import TextConfig, check_source
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.source import weights_crc32
from sae.disk.checksum import crc32
from sae.disk.places import require_folder
from sae.disk.writing import atomic, jsonable, write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sampling import Sampling
from sae.pieces import pieces
from sae.processes import Processes
from sae.text_input import text_list
from steering.compare.arms import NONE, Arm, ArmInputs, Method, build_arms
from steering.compare.concepts import Texts, TextScore, concept_texts, read_labelled_texts, second_score, target_score
from steering.compare.continuations import ComparisonSetup, continuations, measure_arms
from steering.compare.scores import comparison_verdict, estimate_text
from steering.concept import Concept, load_concept
from steering.dictionary import load_dictionary
from steering.directions.targeted import Effects
from steering.strength.neutral import PROMPTS

FORMAT = "comparison-1"
TIMED_TOKENS = (2, 10)  # new tokens of the two samples by which the time is guessed
PASSES = (7, 3)  # for each vector and for each of its budgets, in units of an unsteered pass of the neutral sentences


@dataclass(kw_only=True)
class CompareConfig(TextConfig):
    concept: str
    """A concept of the package (curse_words, bible ...), a concept's .json file, or label:NAME for a label of the text."""
    model: str
    """Model by hub name, folder or GGUF file."""
    dictionary: str | None = None
    """Folder, file or hub name of a dictionary of this model. Default: the arms of dictionary features are left out."""
    feature: int | None = None
    """A feature of the dictionary to compare as well, such as one found in the browser."""
    effects: Path | None = None
    """Effects of this dictionary's features, fitted by `sae effects --fit`. Default: the arm of SAE-TS is left out."""
    methods: tuple[Method, ...] = ()
    """Methods to compare; baselines and controls are always included. Default: all whose inputs exist."""
    site: str | None = None
    """Site to steer at, such as resid_post.2. Default: the dictionary's own site."""
    out: Path | None = None
    """Folder for comparison.json and report.html; default "comparison-" and the concept's name. Run again with the same settings, an
    interrupted comparison continues with the remaining arms."""
    budgets: tuple[float, ...] = (0.1, 0.3, 1.0)
    """KL budgets, nats per token of neutral text."""
    prompts: tuple[str, ...] = PROMPTS
    """Texts to continue; every second one chooses the budget, the others score it."""
    samples: int = 4
    """Number of continuations of each prompt at each strength."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    dry_run: bool = False
    """Print what would be done and about how long it would take, and stop."""


def compare_directions(config: CompareConfig) -> dict[str, Any]:
    """Writes comparison.json and report.html, prints the table and returns the content of the JSON (of a dry run, nothing).

    Killed and started again, it keeps the finished arms and measures the others (see sae/pieces.py). Called in every process that torchrun
    started, they share the arms; when one of them fails, so do the others, with SystemExit.

    Raises `InputError` for parts that do not belong together, an empty concept, and texts or prompts longer than the context.
    """
    refuse_unusable(config)
    concept = load_concept(config.concept)
    out = config.out or Path(f"comparison-{concept.name.replace(':', '-')}")
    if not config.dry_run:
        require_folder(out)
    processes = Processes.from_environment()
    with processes.together():
        inputs = load_inputs(config, concept, processes.device(config.device))
        if config.dry_run:
            if processes.leads:
                announce(*prepare(config, inputs), out)
            return {}
        with pieces(processes, out, decisive(config, inputs)) as made:
            setup, arms = prepare(config, inputs)
            if processes.leads:
                announce(setup, arms, out)
            result = jsonable(facts(config, inputs, setup, arms, *measure_arms(setup, arms, made)))
            if processes.leads:
                write_files(result, out)
                print_comparison(result, out)
    return result


def load_inputs(config: CompareConfig, concept: Concept, device: str) -> ArmInputs:
    lm, seed = LanguageModel.load(config.model, device=device), config.sampling.seed
    dictionary, site = dictionary_and_site(config, lm)
    refuse_long_prompts(lm, config)
    if config.feature is not None and not (dictionary and 0 <= config.feature < dictionary.d_sae):
        has = f"one with features 0 to {dictionary.d_sae - 1}" if dictionary else "none"
        raise InputError(f"expected a dictionary that has feature {config.feature}, got {has}; give another --dictionary or --feature")
    corpus = read_labelled_texts(config, lm) if config.text or config.dataset else None
    texts = Texts(*([fitting(lm, text) for text in part] for part in concept_texts(concept, corpus, seed)))
    effects = None if config.effects is None else Effects.load(config.effects)
    new_tokens = config.sampling.max_new_tokens
    return ArmInputs(lm, site, concept, texts, config.prompts, new_tokens, dictionary, corpus, effects, config.feature, seed)


def prepare(config: CompareConfig, inputs: ArmInputs) -> tuple[ComparisonSetup, list[Arm]]:
    arms = build_arms(inputs, config.methods)
    concept, texts, seed = inputs.concept, inputs.texts, inputs.seed
    target, second = target_score(concept, texts, seed), second_score(concept, texts, seed)
    held = (texts.held_positive, texts.held_negative)
    return ComparisonSetup(inputs.lm, config.prompts, config.samples, config.sampling, config.budgets, target, second, held), arms


def facts(
    config: CompareConfig,
    inputs: ArmInputs,
    setup: ComparisonSetup,
    arms: Sequence[Arm],
    entries: list[dict[str, Any]],
    broken: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of comparison.json, before numbers that JSON cannot hold are replaced."""
    name, texts = inputs.concept.name, {name: len(part) for name, part in inputs.texts._asdict().items()}
    return {
        "format": FORMAT,
        "concept": asdict(inputs.concept),
        "model": config.model,
        "site": inputs.site,
        "dictionary": config.dictionary,
        "seed": inputs.seed,
        "settings": asdict(config) | {"command": shlex.join(sys.argv), "texts": texts},
        "target": score_facts(setup.target),
        "second_target": score_facts(setup.second),
        "arms": entries,
        "broken": broken,
        "cosines": cosines(arms, inputs.site),
        "verdict": comparison_verdict(entries, name, setup.target.held_out_auroc, inputs.seed),
    }


def write_files(result: dict[str, Any], out: Path) -> None:
    from steering.compare.report import report_html

    html = report_html(result)
    write_json(out / "comparison.json", result)
    with atomic(out / "report.html") as temporary:
        temporary.write_text(html, encoding="utf-8")


def decisive(config: CompareConfig, inputs: ArmInputs) -> dict[str, Any]:
    """Everything that decides the numbers of the arms: options, and the content of the files and folders that they name."""
    chosen = {name: value for name, value in asdict(config).items() if name not in ("out", "device", "dry_run")}
    dictionary, texts = inputs.dictionary, repr((inputs.concept, inputs.texts, inputs.corpus))
    return jsonable(
        chosen
        | {
            "fingerprint": inputs.lm.fingerprint(),
            "weights": dictionary and weights_crc32(str(config.dictionary), [dictionary.parts()]),
            "effects_crc32": config.effects and crc32(config.effects),
            "texts_crc32": zlib.crc32(texts.encode("utf-8", "surrogatepass")),
        }
    )


def refuse_unusable(config: CompareConfig) -> None:
    """Checks that need nothing loaded."""
    budgets, prompts = config.budgets, text_list(config.prompts, "prompts")
    if not budgets or not all(math.isfinite(budget) and budget > 0 for budget in budgets) or list(budgets) != sorted(set(budgets)):
        raise InputError(f"expected KL budgets above 0 in rising order, got {', '.join(map(str, budgets)) or 'none'}")
    if len(prompts) < 4 or len(set(prompts)) < len(prompts) or config.samples < 1:
        raise InputError(
            f"expected at least 4 different prompts, half of them to choose by, and 1 sample, got {len(set(prompts))} different ones of "
            f"{len(prompts)} and {config.samples}"
        )
    if config.text or config.dataset:
        check_source(config)


def refuse_long_prompts(lm: LanguageModel, config: CompareConfig) -> None:
    new_tokens = config.sampling.max_new_tokens
    for prompt in config.prompts:
        if (length := lm.encode([prompt])[0].shape[1]) + new_tokens > lm.context:
            raise InputError(
                f"expected prompts that leave room for {new_tokens} new tokens in the {lm.context} positions of {lm.name!r}, "
                f"got one of {length} tokens, {prompt[:60]!r}; shorten it or ask for fewer new tokens"
            )


def dictionary_and_site(config: CompareConfig, lm: LanguageModel) -> tuple[Dictionary | None, str]:
    """The dictionary, if one was named, and the site. Raises `InputError` unless it was trained on this model and site."""
    if config.dictionary is not None:
        return load_dictionary(config.dictionary, lm, config.site)
    if config.site is None:
        raise InputError("expected --site, such as resid_post.2, or --dictionary with a dictionary that knows its own, got neither")
    lm.width(config.site)
    return None, config.site


def fitting(lm: LanguageModel, text: str) -> str:
    """A text that the model can read whole: one longer than the context loses its end."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) < lm.context else lm.tokenizer.decode(ids[: lm.context * 3 // 4], skip_special_tokens=True)


def cosines(arms: Sequence[Arm], site: str) -> dict[str, Any]:
    """Cosines between the directions that are one direction at the site; the others have none."""
    there = [(arm.method, d) for arm in arms if arm.vector and (d := arm.vector.directions.get(site)) is not None and d.ndim == 1]
    if not there:
        return {"methods": [], "matrix": []}
    units_kd = torch.nn.functional.normalize(torch.stack([d.cpu().double() for _, d in there]), dim=-1)
    return {"methods": [method for method, _ in there], "matrix": (units_kd @ units_kd.T).tolist()}


def works_up_to(arm: dict[str, Any]) -> str:
    """The end of an arm's working range, for a cell; nothing for an arm that has none."""
    works = arm["working_range"]
    if works is None:
        return ""
    return f"over {works['tried']:.3g}" if works["coefficient"] is None else f"{works['coefficient']:.3g}"


def score_facts(scorer: TextScore | None) -> dict[str, Any] | None:
    return None if scorer is None else {name: getattr(scorer, name) for name in ("kind", "describe", "held_out_auroc")}


def announce(setup: ComparisonSetup, arms: Sequence[Arm], out: Path) -> None:
    """Prints what will be done; the time is estimated from short continuations and a pass of the neutral sentences, both without
    steering."""
    for arm in arms:
        print(f"{arm.method}: " + (f"left out, {arm.left_out}" if arm.left_out else arm.note or "ready"))
    present = [arm for arm in arms if arm.left_out is None]
    vectors = sum(arm.vector is not None for arm in present)
    levels = len(present) - vectors + vectors * len(setup.budgets)
    new = setup.sampling.max_new_tokens
    seconds = []
    for tokens in (min(tokens, new) for tokens in (TIMED_TOKENS[0], *TIMED_TOKENS)):  # the first warms up
        started = time.monotonic()
        continuations(replace(setup, sampling=replace(setup.sampling, max_new_tokens=tokens)), arms[0], 0.0, setup.samples)
        seconds.append(time.monotonic() - started)
    _, short, long = seconds
    each = long + max(long - short, 0.0) / (TIMED_TOKENS[1] - TIMED_TOKENS[0]) * max(new - TIMED_TOKENS[1], 0)
    started = time.monotonic()
    _ = setup.off_topic.unsteered_nv
    passes = vectors * (PASSES[0] + PASSES[1] * len(setup.budgets)) * (time.monotonic() - started)
    minutes = (each * levels + passes) / 60
    texts = len(setup.prompts) * setup.samples
    print(f"{levels} strengths of {len(present)} arms, {texts} continuations of {new} tokens each: about {minutes:.1f} minutes", flush=True)
    print(f"comparison.json and report.html go into {out}")


def print_comparison(result: dict[str, Any], out: Path) -> None:
    """Prints the best strength of each arm, then the verdict."""
    from rich.console import Console
    from rich.table import Table

    columns = ("method", "budget", "gain (95 %)", "detection", "nats/token", "distinct-2", "off-topic KL", "coefficient, ρ, max. act.")
    table = Table(
        *columns,
        "works up to",
        title=f"{result['concept']['name']} at {result['site']} of {result['model']}: {result['target']['describe']}",
        caption="works up to: the largest coefficient before the first sign of breaking; beyond: the strength of this row is larger",
    )
    for arm in result["arms"]:
        best = arm["best"]
        if best is None:
            table.add_row(arm["method"], "left out" if arm["left_out"] else "no text")
            continue
        level = next(level for level in arm["levels"] if level["budget"] == best["budget"])
        strengths = [level[unit] for unit in ("coefficient", "rho", "max_activations")]
        table.add_row(
            arm["method"],
            "" if best["budget"] is None else f"{best['budget']:g}" + ", not reached" * (not level["reached"]),
            "" if arm["method"] == NONE else estimate_text(best["gain"], ".3g"),
            "" if arm["detection_auroc"] is None else f"{arm['detection_auroc']['value']:.2f}",
            f"{level['nats_per_token']['value']:.2f}",
            "" if level["distinct_2"] is None else f"{level['distinct_2']:.2f}",
            f"{level['off_topic_kl'] or 0:.2f}",
            ", ".join("-" if units is None else f"{units:.3g}" for units in strengths) if level["coefficient"] else "",
            works_up_to(arm) + ", beyond" * bool(level["beyond_working_range"]),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a log has no width of its own
    for arm in result["arms"]:
        if arm["left_out"]:
            print(f"left out: {arm['method']}, {arm['left_out']}")
        if arm["no_working_range"]:
            print(f"without a working range: {arm['method']}, {arm['no_working_range']}")
    print("\n".join(result["verdict"]))
    print(f"everything is in {out / 'comparison.json'}, to look at in {out / 'report.html'}")
