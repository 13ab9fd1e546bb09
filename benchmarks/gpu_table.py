"""The numbers of gpu.py as Markdown; a part that has not left any is passed over."""

from collections.abc import Iterator
from typing import Any

from activation_report import table
from arms import LABELS
from objective import BenchmarkConfig, Case, floor
from report import spread_text
from rounds import SAME_LOSS

KERNELS = ("encode", "decode", "scatter", "learn")
STEPS = ["d", "F", "operands", "arm", "ms", "ms on the device alone", "times the floor", "times the product", "peak MiB", "loss"]
INSIDE = ["d", "F", "operands", "arm", *KERNELS, "sorting and lists", "rest of the gradients", "clipping", "Adam by torch", "whole"]


def markdown(record: dict[str, Any]) -> str:
    answers = {name: [a for a in part["answers"] if a.keys() != {"error"}] for name, part in record["parts"].items()}
    facts = merged(answers.get("machine", []))
    rates = {a["precision"]: a["tflops"] for a in answers.get("machine", []) if "tflops" in a}
    timed = [a for name in ("steps", "eager", "compile", "saelens", "dictionary_learning", "sparsify") for a in answers.get(name, [])]
    tables = ((STEPS, list(steps(timed, facts, rates))), (INSIDE, list(inside(timed))))
    parts = [
        f"{facts.get('gpu', 'no GPU')}, torch {facts.get('torch')}, {record['date']}"
        + (f"; copy {facts['bandwidth_gb']:,.0f} GB/s" if "bandwidth_gb" in facts else "")
        + "".join(f", {precision} product {rate:,.1f} TFLOP/s" for precision, rate in rates.items()),
        "\n".join(table(["part", "seconds", "state", "its last line"], [ended(name, part) for name, part in record["parts"].items()])),
        exactness(answers.get("exact", [])),
        *("\n".join(table(columns, rows)) for columns, rows in tables if rows),
        *(training(a) for a in answers.get("train", [])),
        *(harvested(a) for a in answers.get("harvest", [])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def ended(name: str, part: dict[str, Any]) -> list[str]:
    last = (part.get("last_lines") or [""])[-1].replace("|", "/")
    return [name, str(part.get("seconds")), part["state"], last[:100]]


def merged(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for answer in answers for name, value in answer.items() if "tflops" not in answer}


def exactness(answers: list[dict[str, Any]]) -> str:
    """The largest error of any gradient by precision, and the cases that were wrong."""
    if not answers:
        return ""
    said = [f"Against float64: {sum(bool(a.get('ok')) for a in answers)} of {len(answers)} cases within tolerance."]
    for precision in dict.fromkeys(a["precision"] for a in answers):
        errors = [e for a in answers if a["precision"] == precision for e in a.get("errors", {}).values()]
        said += [f"Largest relative error with {precision} operands {max(errors):.1e}."] if errors else []
    return " ".join(said) + "".join(f"\n- wrong: {a}" for a in answers if not a.get("ok"))


def label(a: dict[str, Any]) -> str:
    if a["arm"] != "ours":
        return LABELS["eager_tuned" if a["arm"] == "eager" else a["arm"]]
    return f"ours, {'' if a['deterministic'] else 'not '}deterministic, {'clipped' if a['clip'] else 'not clipped'}"


def steps(answers: list[dict[str, Any]], facts: dict[str, Any], rates: dict[str, float]) -> Iterator[list[str]]:
    """The floor is the sum of both: operations over the measured rate of products, and the bytes of weights and moments, read and
    written once in float32, over the measured bandwidth. Adam cannot begin before the product is done, so neither hides the other."""
    for d, f, precision in dict.fromkeys((a["d"], a["f"], a["precision"]) for a in answers):
        mine = [a for a in answers if (a["d"], a["f"], a["precision"]) == (d, f, precision)]
        encoder = next((a for a in mine if a["arm"] == "encoder" and "ms" in a), None)
        loss = next((a["loss"] for a in mine if a["arm"] == "ours" and "loss" in a), None)
        least = None
        if encoder and rates.get(precision) and "bandwidth_gb" in facts:
            config = BenchmarkConfig(peak_tflops=rates[precision], bandwidth=facts["bandwidth_gb"])
            found = floor(config, Case(d, f, encoder["l0"], encoder["rows"]), encoder["l0"])
            least = sum(found.values())
            parts = f"{found['operations']:.3f} for operations, {found['bytes']:.3f} for bytes"
            yield [f"{d:,}", f"{f:,}", precision, f"floor: {parts}", f"{least:.3f}", *[""] * 5]
        for a in mine:
            if "ms" not in a:
                yield [f"{d:,}", f"{f:,}", precision, label(a), a["error"], *[""] * 5]
                continue
            own = a["device_ms"]["median"]
            times = [f"{own / least:.2f}" if least else "", f"{own / encoder['device_ms']['median']:.2f}" if encoder else ""]
            same = "" if None in (a.get("loss"), loss) else "same" if near(a["loss"], loss) else f"{a['loss']:.5g}, not {loss:.5g}"
            yield [
                *(f"{d:,}", f"{f:,}", precision, label(a), spread_text(a["ms"], 3), spread_text(a["device_ms"], 3)),
                *(*times, f"{a['peak_mib']:,.0f}", same),
            ]


def near(a: float, b: float) -> bool:
    return abs(a - b) <= SAME_LOSS["cuda"] * abs(b)


def inside(answers: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Where our step spends its time on the device, in ms."""
    for a in answers:
        if "kernels" not in a:
            continue
        ms = {"scatter": 0.0, "clip": 0.0, "step": 0.0, **a["kernels"]}
        lists = ms["encode_rows"] + ms["decode_rows"] - ms["encode"] - ms["decode"] - ms["scatter"]
        shown = [*(ms[name] for name in KERNELS), lists, ms["learn_features"] - ms["learn"], ms["clip"], ms["step"], ms["whole"]]
        yield [f"{a['d']:,}", f"{a['f']:,}", a["precision"], label(a), *(f"{value:.3f}" for value in shown)]


def training(a: dict[str, Any]) -> str:
    share = f"; {a['loader_share']:.0%} of the time in the loader, over {a['steps']:,} steps" if "steps" in a else ""
    return f"Training, {a['what']}: {a['rows_per_second']:,.0f} rows/s{share}."


def harvested(a: dict[str, Any]) -> str:
    arms = (f"{arm['label']} {arm['tokens_per_second']['median']:,.0f} tokens/s" for arm in a["arms"].values())
    return f"Harvest: {'; '.join(arms)}; {a['arms']['harvest']['times_bare']['median']:.2f} of the bare pass."
