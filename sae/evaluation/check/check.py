"""Whether a dictionary does what its source states, on about 2,000 tokens; and if not, which alternative fits."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from sae.activations.text.documents import TextConfig
from sae.dictionaries.dictionary import Dictionary
from sae.dictionaries.formats.saelens.cfg import CFG
from sae.dictionaries.source import locate
from sae.disk.folders import fresh_folder, require_replaceable
from sae.disk.mapped import is_mapped, require_room
from sae.disk.places import require_file, require_folder
from sae.disk.writing import write_json
from sae.errors import InputError
from sae.evaluation.check import report
from sae.evaluation.check.alternatives import Use, points
from sae.evaluation.check.corrected import corrected, inexpressible
from sae.evaluation.check.promises import promises
from sae.evaluation.check.recording import Point, Recorder, read_sequences
from sae.evaluation.check.search import Search
from sae.evaluation.check.trial import Sample, Trial
from sae.evaluation.check.verdict import judge
from sae.evaluation.language_model_loss import language_model_loss
from sae.statistics import estimate

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel

TEXT = Path(__file__).with_name("text.jsonl")
"""English prose, dialogue, code and lists, written for this purpose"""
SPLICED = 16
"""sequences on which the model's loss is measured, four passes each"""


@dataclass
class CheckConfig:
    dictionary: Positional[str]
    """Folder, file or hub name of the dictionary."""
    model: str
    """Hub name, folder or GGUF file of the language model."""
    site: str | None = None
    """Site, such as resid_post.2, if the dictionary names none. Default: the dictionary's own."""
    other_model: str | None = None
    """A second model to try, such as the instruct model of a base model. Default: none."""
    text: tuple[str, ...] = ()
    """Files with text (.txt, .jsonl, .json, .parquet; .safetensors with token ids), folders or globs. Default: a text of the package."""
    tokens: int = 2000
    """Maximum number of tokens to measure on."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    seed: int = 0
    """Seed of the bootstrap."""
    json: bool = False
    """Print the report as JSON instead of tables."""
    out: Path | None = None
    """File for the report as JSON. Default: not written."""
    write: Path | None = None
    """Folder for the dictionary in the frame that fits best, in SAELens' layout. Default: not written."""


def check(config: CheckConfig) -> dict[str, Any]:
    """The report, which is also printed and, where asked for, written.

    Raises `InputError` for a dictionary that cannot be opened or has another width than its site, a site that the model does not have, a
    second model with another tokenizer, and a place that cannot be written.
    """
    from sae.model.language_model import LanguageModel

    if config.tokens < 100:
        raise InputError(f"--tokens must be at least 100, got {config.tokens}")
    if config.out:
        require_file(config.out)
    if config.write:
        require_folder(config.write)
        require_replaceable(config.write, CFG, "dictionary")
    path = locate(config.dictionary).path
    if config.write and path.resolve() in (config.write.resolve(), *config.write.resolve().parents):
        raise InputError(f"expected --write to name a folder outside the dictionary's own {path}, got {config.write}; choose another one")
    lm = LanguageModel.load(config.model, device=config.device)
    dictionary = Dictionary.load(config.dictionary, lm.device)
    if is_mapped(dictionary.W_dec_fo):  # each alternative is its own dictionary
        size = 4 * (dictionary.W_enc_fd.numel() + dictionary.W_dec_fo.numel())
        require_room(2 * size, f"the alternatives to the dictionary in {config.dictionary}")
    other = LanguageModel.load(config.other_model, device=config.device) if config.other_model else None
    declared = as_declared(dictionary, lm, config.site)
    recorder = Recorder(lm, sequences_of(config, lm, other), other)
    recorder.begin(points(declared, recorder))
    rows = int((~recorder.massive_n).sum())
    search = Search(Sample(recorder, config.seed), promises(path, dictionary, rows))
    steps = search.run(declared)
    found = [measures(one, rows, config.seed) for one in dict.fromkeys((steps[0], steps[-1]))]
    verdict = judge(steps, search.promises, found[0])
    result = report.describe(config, search, steps, found, verdict)
    if config.write:
        result["written"] = write(config.write, steps[-1])
    if config.out:
        write_json(config.out, result)
    report.show(result, as_json=config.json)
    return result


def command(config: CheckConfig) -> None:
    """Exits with code 1 unless the verdict is good."""
    if check(config)["verdict"] != "good":
        sys.exit(1)


def as_declared(dictionary: Dictionary, lm: "LanguageModel", site: str | None) -> Use:
    """Raises `InputError` for a site that the model does not have, or that is of another width."""
    site = dictionary.require_site(site)
    bos = bool(dictionary.metadata.get("prepend_bos", True)) and lm.bos_id is not None
    ends = [site, dictionary.site_out or site]
    for place, width in zip(ends, (dictionary.d_in, dictionary.d_out)):
        if lm.width(place) != width:
            raise InputError(
                f"expected a dictionary {lm.width(place)} wide for {place} of {lm.name}, got one for {width}; it was made for another model"
            )
    return Use(dictionary, Point(ends[0], bos), Point(ends[1], bos))


def sequences_of(config: CheckConfig, lm: "LanguageModel", other: "LanguageModel | None") -> list[np.ndarray]:
    text = TextConfig(text=config.text or (str(TEXT),))
    found = read_sequences(lm, text, config.tokens)
    if other is not None:
        theirs = read_sequences(other, text, config.tokens)
        if len(theirs) != len(found) or not all(map(np.array_equal, found, theirs)):
            raise InputError(f"expected {other.name} to make the same tokens of the text as {lm.name}, but it does not; give its own text")
    return found


def measures(one: Trial, rows: int, seed: int) -> dict[str, Any]:
    """Each measure with its interval over sequences, if it has one."""
    named = {"l0": one.fit.l0, "fvu": one.fit.fvu, "norm_ratio": one.fit.norm_ratio, "cosine": one.fit.cosine}
    found: dict[str, Any] = {name: estimate(function(one.sample.weight_rs)) for name, function in named.items()}
    silent = one.fit.silent / one.use.dictionary.d_sae
    return found | {"random_fvu": one.random_fvu, "silent_share": silent, "rows": rows, "loss_recovered": loss_recovered(one, seed)}


def loss_recovered(one: Trial, seed: int) -> dict[str, float] | None:
    """With the dictionary spliced in, against zeros; None if its output is not at a site of the model."""
    use, recorder = one.use, one.sample.recorder
    lm = recorder.model(use.reads)
    if use.writes.before_norm:
        return None
    first = np.array([lm.bos_id] * use.reads.bos, dtype=np.int64)
    measured_n = (~recorder.massive_n & (recorder.position_n >= use.first)).numpy()
    sequences, replaced = [], []
    for s, ids in enumerate(recorder.sequences[:SPLICED]):
        sequences.append(np.concatenate([first, ids]))
        replaced.append(np.concatenate([np.zeros(len(first), bool), measured_n[recorder.sequence_n.numpy() == s]]))
    means = {use.writes.site: recorder.values(use.writes)[measured_n].double().mean(0)}
    loss = language_model_loss(lm, [corrected(use, recorder)], sequences, means, replaced=replaced, seed=seed)
    low, high = loss.loss_recovered_interval
    return {"value": loss.loss_recovered, "low": low, "high": high}


def write(out: Path, best: Trial) -> dict[str, Any]:
    """Returns a sentence about what was written, or why nothing was."""
    if not best.fits:
        return {"folder": None, "why": "nothing that fits was found"}
    if missing := inexpressible(best.use):
        return {"folder": None, "why": f"a dictionary's folder cannot record {' and '.join(missing)}"}
    with fresh_folder(out, CFG, "dictionary") as folder:
        corrected(best.use, best.sample.recorder).save(folder)
    return {"folder": str(out), "why": best.use.name}
