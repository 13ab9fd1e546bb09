"""SAEDashboard's folder, written and read: batch-N.json, skipped_indexes.json, run_settings.json.

f features · d model width

Tables that need activations of the model's neurons (correlated neurons) and of pairs of features (correlated features) are left empty:
an index has none. `tokens_N.pt`, which SAEDashboard keeps for itself, is a pickle and is not written.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from typing_extensions import TypedDict

from sae.dictionaries.formats.transformer_lens import hook_of_site
from sae.disk.reading import Count, LongList, read_json
from sae.disk.writing import atomic, write_json
from sae.errors import InputError
from sae.model.sites import parse_site
from sae.progress import progress

if TYPE_CHECKING:
    from sae.features.index.reader import Context, FeatureIndex

BATCH = 128  # features per file
BINS = 50  # of the activation histogram, as SAEDashboard has it
NEURONS = 3  # shown of a decoder row
TOP = 20
TABLES = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist"),
)
NO_ATTRIBUTION = {"dfa_values": [], "dfa_maxValue": 0, "dfa_targetIndex": -1}  # as SAEDashboard writes where it computed none
SHORT_SITES = {
    "resid_pre": "res-pre",
    "resid_mid": "res-mid",
    "resid_post": "res",
    "attn_out": "att",
    "mlp_out": "mlp",
    "head_out": "att-z",
}


class Names(NamedTuple):
    """Other tools' names for this dictionary."""

    model: str
    layer: int
    set: str
    """source set, for example res-4k"""
    hook: str
    """TransformerLens' name of the site where its decoder rows are added, as steering vectors"""

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set}"


def names_of(index: "FeatureIndex", model: str | None = None, source_set: str | None = None) -> Names:
    """From the index's model, site and width, or as given. The names of a transcoder differ from those of dictionaries of the site that it
    reads."""
    site, site_out = index.info["site"], index.info.get("site_out")
    if not isinstance(site, str) or not isinstance(site_out, str | None):
        raise InputError(f"expected an index of a dictionary of one site, got one of {index.place}; sae export --format static takes it")
    kind, layer = parse_site(site)
    short = SHORT_SITES.get(kind, kind.replace("_", "-")) if site_out is None else "transcoder"
    width = f"{index.d_sae // 1000}k" if index.d_sae >= 1000 else str(index.d_sae)
    known = index.info["model"]["name"].rstrip("/").rsplit("/", 1)[-1]
    return Names(model or known, max(layer, 0), source_set or f"{short}-{width}", hook_of_site(site_out or site) or "")


def write_saedashboard(
    index: "FeatureIndex", folder: Path, features: Sequence[int], names: Names, W_dec_fd: np.ndarray | None = None
) -> None:
    """Writes `features` into the empty `folder`; those that never fire are listed in skipped_indexes.json, like SAEDashboard's dead ones.

    `W_dec_fd` [f, d] are the decoder rows, as steering vectors and for the neuron alignment.
    """
    starts = index.tokens["sequence_starts"]
    prompts, longest = len(starts) - 1, int(np.diff(starts).max())
    alive = [j for j in features if index.columns["count"][j]]
    settings = {"model_id": names.model, "layer": names.layer, "sae_set": names.set, "n_features_at_a_time": BATCH}
    settings |= {"n_prompts_total": prompts, "n_tokens_in_prompt": longest, "sae_dtype": "float32"}
    write_json(folder / "run_settings.json", settings)
    skipped = {"model_id": names.model, "layer": str(names.layer), "sae_set": names.set, "log_sparsity": None}
    write_json(folder / "skipped_indexes.json", skipped | {"skipped_indexes": [int(j) for j in features if not index.columns["count"][j]]})
    with progress("write batches", len(alive), "features") as bar:
        for n, low in enumerate(range(0, len(alive), BATCH)):
            part = alive[low : low + BATCH]
            rows = []
            for j in part:
                row = {"feature_index": int(j)} | tables(index, j, W_dec_fd)
                row |= {"n_prompts_total": prompts, "n_tokens_in_prompt": longest, "dataset": ""}
                row["vector"] = [] if W_dec_fd is None else W_dec_fd[j].tolist()
                rows.append(row | {"activations": [_activation(*example) for example in example_rows(index, j)]})
                bar.advance(1)
            batch = {"model_id": names.model, "layer": names.layer, "sae_set": names.set, "sae_id_suffix": None, "features": rows}
            _write(folder / f"batch-{n}.json", batch)


def tables(index: "FeatureIndex", j: int, W_dec_fd: np.ndarray | None = None) -> dict[str, Any]:
    """The fields of a feature that SAEDashboard and Neuronpedia share."""
    values = index.signed_values(j)
    ends = min(values.min(initial=0), 0.0), max(values.max(initial=0), 0.0)
    heights, edges = np.histogram(values, BINS, ends) if ends[0] < ends[1] else (np.zeros(0), np.zeros(1))
    logit_edges, logit_heights = index.lens_histogram(j)
    sides = {"pos": index.lens_tokens(j), "neg": index.lens_tokens(j, bottom=True)}
    row: dict[str, Any] = {name: [] for name in TABLES}
    for side, tokens in sides.items():
        row[f"{side}_str"] = [index.vocabulary.spelling(token) for token, _ in tokens]
        row[f"{side}_values"] = [float(value) for _, value in tokens]
    row["frac_nonzero"] = int(index.columns["count"][j]) / int(index.info["tokens_scanned"])
    row["freq_hist_data_bar_heights"], row["freq_hist_data_bar_values"] = heights.tolist(), _middles(edges)
    row["logits_hist_data_bar_heights"], row["logits_hist_data_bar_values"] = logit_heights.tolist(), _middles(logit_edges)
    if W_dec_fd is not None:
        best = np.argsort(-W_dec_fd[j], kind="stable")[:NEURONS]
        row["neuron_alignment_indices"], row["neuron_alignment_values"] = best.tolist(), W_dec_fd[j, best].tolist()
        row["neuron_alignment_l1"] = (np.abs(W_dec_fd[j, best]) / max(float(np.abs(W_dec_fd[j]).sum()), 1e-30)).tolist()
    return row


def example_rows(index: "FeatureIndex", j: int) -> "Iterator[tuple[float, float, float, Context]]":
    """Contexts with (bin_min, bin_max, bin_contains): the top ones under -1, the maximum, -1, then a sample of each interval.

    Intervals are of absolute values; if activations may be negative, a context's own values keep their signs.
    """
    for context in index.top_contexts(j, TOP):
        yield -1.0, float(index.columns["max"][j]), -1.0, context
    for bucket in index.bucket_contexts(j):
        for context in bucket.contexts:
            yield bucket.low, bucket.high, bucket.count / int(index.columns["count"][j]), context


def _activation(low: float, high: float, contains: float, context: "Context") -> dict[str, Any]:
    row = {"bin_min": low, "bin_max": high, "bin_contains": contains, "tokens": context.texts, "values": context.values.tolist()}
    return row | {"qualifying_token_index": context.centre, **NO_ATTRIBUTION}


class Activation(TypedDict):
    tokens: list[str]
    values: list[float]


class FeatureRow(TypedDict):
    """And the fields of `TABLES`."""

    feature_index: Count
    activations: LongList[Activation]


class FeatureBatch(TypedDict):
    model_id: str
    layer: int | str
    sae_set: str
    features: LongList[FeatureRow]


class SAEDashboardFolder(NamedTuple):
    """A folder of SAEDashboard, field for field."""

    settings: dict[str, Any]
    skipped: dict[str, Any]
    batches: dict[str, dict[str, Any]]
    """by file name without .json: model_id, layer, sae_set, features"""


def read_saedashboard(folder: str | Path) -> SAEDashboardFolder:
    """Raises `InputError` for a folder without batches, or a batch that lacks fields."""
    folder = Path(folder)
    paths = sorted(folder.glob("batch-*.json"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise InputError(f"expected SAEDashboard's batch-0.json and so on in {folder}, but there are none; check the folder's name")
    batches = {path.stem: read_json(path, "a batch of SAEDashboard", FeatureBatch) for path in paths}
    for name, batch in batches.items():
        missing = [key for row in batch["features"] for key in TABLES if key not in row]
        if missing:
            raise InputError(f"expected the field {missing[0]} in {folder / name}.json, which lacks it; is it of an older version?")
    return SAEDashboardFolder(_read_if_there(folder / "run_settings.json"), _read_if_there(folder / "skipped_indexes.json"), batches)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path, "a file of SAEDashboard", dict[str, Any]) if path.exists() else {}


def rewrite_saedashboard(read: SAEDashboardFolder, folder: Path) -> None:
    """Writes the result of `read_saedashboard` into the empty `folder`."""
    for name, value in (("run_settings", read.settings), ("skipped_indexes", read.skipped), *read.batches.items()):
        if value:
            _write(folder / f"{name}.json", value, allow_nan=True)  # unchanged, though JSON has no NaN


def _middles(edges: np.ndarray) -> list[float]:
    return ((edges[1:] + edges[:-1]) / 2).tolist()


def _write(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    data = encoded(value, path, allow_nan=allow_nan)
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def encoded(value: Any, path: Path, *, allow_nan: bool = False) -> bytes:
    """JSON to write at `path`. Raises `InputError` for values that JSON cannot hold but a read file may: NaN, half of a character."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=allow_nan).encode()
    except ValueError as error:
        raise InputError(f"expected values that JSON can hold, to write {path}, but one is not ({error}); fetch them again") from None
