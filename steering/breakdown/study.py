"""The command that measures many directions of one model, for intervals over directions of what breaks it."""

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tyro.conf import OmitArgPrefixes

from sae.disk.places import require_folder
from sae.disk.reading import read_json
from sae.disk.writing import atomic, jsonable, write_json
from sae.errors import InputError
from sae.model.language_model import LanguageModel
from sae.model.sampling import Sampling
from sae.model.sites import parse_site
from sae.progress import progress
from sae.text_input import text_list
from steering.breakdown.arms import make_arms
from steering.breakdown.command import result_of
from steering.breakdown.study_summary import markdown, summary
from steering.breakdown.sweep import make_setup, sweep
from steering.concept import load_concept, shipped_concepts
from steering.dictionary import load_dictionary
from steering.directions.texts import activations_of_texts
from steering.named_direction import named_direction
from steering.strength.neutral import FEW_PROMPTS, MEASURED, OTHERS

FORMAT = "breakdown-study-1"
DEPTHS = (1 / 6, 1 / 2, 5 / 6)
"""depths of the blocks after which directions are measured by default; never the last one, after which nothing reads the stream"""


@dataclass(kw_only=True)
class StudyConfig:
    model: str
    """Model by hub name, folder or GGUF file."""
    out: Path
    """Folder for study.json, study.md and a JSON file of each direction; directions that already have a file are not measured again."""
    dictionary: str | None = None
    """Folder, file or hub name of a dictionary of the residual stream. Default: no features are measured."""
    sites: tuple[str, ...] = ()
    """Sites of the residual stream. Default: resid_post about a sixth, a half and five sixths of the way in (never the last block), and the
    dictionary's."""
    each: int = 6
    """Directions of each kind at each site: features, differences of means, principal components, random ones."""
    strengths: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    """Lengths of the added vector, in units of the stream's typical norm at the site (rho), rising."""
    prompts: tuple[str, ...] = FEW_PROMPTS
    """Texts to continue at each strength."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:1; auto uses a GPU if there is one."""
    dry_run: bool = False
    """Print which directions would be measured, and stop."""


class Named(NamedTuple):
    site: str
    kind: str
    name: str
    """as --vector of diagnose-breakdown takes it"""

    @property
    def file(self) -> str:
        return f"directions/{self.site}/{self.name.replace(':', '-')}.json"


def study(config: StudyConfig) -> dict[str, Any]:
    """Writes the folder, prints the tables and returns what is in study.json (of a dry run, nothing).

    Raises `InputError` as `diagnose_breakdown` does. A single direction that cannot be measured is left out, with a line that says why.
    """
    started = time.monotonic()
    if config.each < 2 or not text_list(config.prompts, "prompts"):
        raise InputError("expected at least two directions of each kind and one prompt")
    if not config.dry_run:
        require_folder(config.out)
    lm = LanguageModel.load(config.model, device=config.device)
    directions = list(directions_of(config, lm))
    sites = dict.fromkeys(one.site for one in directions)
    print(f"{len(directions)} directions of {config.model} at {', '.join(sites)}", file=sys.stderr)
    if config.dry_run:
        for one in directions:
            print(f"{one.site} {one.kind} {one.name}")
        return {}
    results, left_out = [], {}
    with progress("measuring", len(directions), "directions") as bar:
        for number, one in enumerate(directions):
            try:
                results.append(measured(config, lm, one, number))
            except InputError as reason:
                left_out[f"{one.site} {one.name}"] = str(reason)
                print(f"without {one.name} at {one.site}: {reason}", file=sys.stderr)
            bar.advance(1, direction=one.name, site=one.site)
    if not results:
        raise InputError("expected a direction that can be measured, but all were left out: see above")
    settings = asdict(config) | {"command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}", "seconds": round(time.monotonic() - started)}
    found = jsonable({"format": FORMAT, "model": lm.name, "settings": settings, "left_out": left_out, "summary": summary(results)})
    write_json(config.out / "study.json", found)
    tables = markdown(found)
    with atomic(config.out / "study.md") as temporary:
        temporary.write_text(tables, encoding="utf-8")
    print(tables)
    return found


def directions_of(config: StudyConfig, lm: LanguageModel) -> Iterator[Named]:
    """Directions of every kind at every site; features at the dictionary's site. Raises `InputError` for sites that are not of the
    stream."""
    sites = list(config.sites or dict.fromkeys(f"resid_post.{max(0, min(int(depth * lm.n_layers), lm.n_layers - 2))}" for depth in DEPTHS))
    of_features = None
    if config.dictionary is not None:
        dictionary, of_features = load_dictionary(config.dictionary, lm, None)
        sites += [of_features] if of_features not in sites else []
    concepts = [name for name in shipped_concepts() if load_concept(name).positive][: config.each]
    for site in sorted(sites, key=lambda site: parse_site(site, lm.n_layers).layer):
        if site == of_features:
            h_nd = torch.cat(activations_of_texts(lm, OTHERS, site))
            active = dictionary.encode(h_nd.to(dictionary.dtype)).ne(0).any(0).nonzero().flatten().tolist()  # host sync
            chosen = np.random.default_rng(config.sampling.seed).permutation(active)[: config.each]
            yield from (Named(site, "feature", str(feature)) for feature in sorted(chosen.tolist()))
        yield from (Named(site, "diffmean", f"diffmean:{concept}") for concept in concepts)
        yield from (Named(site, "pca", f"pca:{number}") for number in range(1, min(config.each, lm.width(site)) + 1))
        yield from (Named(site, "random", f"random:{seed}") for seed in range(config.each))


def measured(config: StudyConfig, lm: LanguageModel, one: Named, number: int) -> dict[str, Any]:
    """The measurements of `diagnose_breakdown`, without the strengths of all arms; read from its file if that has the same settings."""
    settings = jsonable(
        {name: getattr(config, name) for name in ("model", "dictionary", "strengths", "prompts")}
        | {"sampling": asdict(config.sampling), "model_fingerprint": lm.fingerprint(), "number": number}
    )
    path = config.out / one.file
    if path.is_file():
        kept = read_json(path, "the measurement of a direction")
        if kept.get("settings") == settings:
            return kept
        print(f"{path} was made with other settings: measured again", file=sys.stderr)
    vector, dictionary, feature = named_direction(lm, one.name, config.dictionary if one.kind == "feature" else None, one.site)
    made = make_arms(lm, vector, config.sampling.seed + number)
    setup = make_setup(lm, vector, MEASURED, OTHERS, made.arms, dictionary, feature)
    found = sweep(setup, made.arms, config.strengths, config.prompts, config.sampling, brief=True)
    result = {"kind": one.kind, "name": one.name, **result_of(setup, made, found, settings)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result
