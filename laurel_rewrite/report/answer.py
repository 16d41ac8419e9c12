"""What a report says, in sentences: what stands first on its page, and on the card of a result's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from laurel_rewrite.profiling import ONE_MORE
from laurel_rewrite.report.words import places, shortened

_NAMES = 60  # characters of a model's name
_PLACES = 2  # sizes of inputs, or phases of a decoder; the table has all


def answer(report: Mapping[str, Any]) -> list[str]:
    """The sentences of a report, given the content of its `report.json`: what was done, what it costs, whether it helps, and how to find out."""
    if report["comparison"]:
        return [*_helped(report["comparison"])]
    return [*_rewritten(report), *_costs(report), *_unknown(report)]


def _helped(comparison: Mapping[str, Any]) -> Iterator[str]:
    rows = comparison["rows"]
    baseline = next((row["name"] for row in rows if row["judgement"]["verdict"] == "baseline"), "the baseline")
    alike = []
    for row in rows:
        found, name = row["judgement"], shortened(row["name"], _NAMES)
        if found["verdict"] in ("better", "worse"):
            size = f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
            yield f"{name} is {found['verdict']} than {baseline}: its loss differs by {size}."
        elif found["verdict"] == "failed":
            yield f"{name} failed to train."
        elif found["verdict"] != "baseline":
            alike.append(name)
    seeds, others = len(comparison["seeds"]), ", ".join(alike)
    if alike and seeds > 1:
        yield f"{seeds} seeds cannot tell {others} from {baseline}."
    elif alike:
        yield f"With one seed nothing is judged: {others} may differ from {baseline}."
    if not comparison["done"]:
        yield "Not all of the models are trained yet."


def _rewritten(report: Mapping[str, Any]) -> Iterator[str]:
    if not report["plan"]:
        return
    sites, parameters = report["plan"]["sites"], report["parameters"]
    counts = Counter(site["variant"] for site in sites)
    variants = ", ".join(f"{variant} ({count})" if len(counts) > 1 else variant for variant, count in counts.items())
    kept = f"; {len(report['skipped'])} kept their plain sum" if report["skipped"] else ""
    added = f", with {100 * parameters['added'] / max(parameters['model'], 1):.2f} % more parameters" if parameters else ""
    connections = "1 residual connection is" if len(sites) == 1 else f"{len(sites)} residual connections are"
    yield f"{connections} {variants} now{added}{kept}."


def _costs(report: Mapping[str, Any]) -> Iterator[str]:
    profile = report["profile"]
    if not profile:
        if report["plan"]:
            yield "Latency and memory were not measured."
        return
    rows, measured = profile["rows"], places(profile["shapes"], profile["phases"])
    for row in rows[1:] or rows:
        for number, time in enumerate(row["latencies"][:_PLACES]):
            where = f" ({measured[number]})" if len(measured) > 1 else ""
            memory = next((one["ratio"] for one in row["figures"] if one["key"] == "activation"), None) if not number else None
            also = f", and {memory:.2f} times the memory for activations" if memory is not None else ""
            verb = "would take" if row["name"] == ONE_MORE else "takes"
            yield f"{_named(row['name'])} {verb} {_latency(time)}{where}{also}."


def _named(name: str) -> str:
    return "One more layer, for comparison," if name == ONE_MORE else shortened(name, _NAMES)


def _latency(time: Mapping[str, Any]) -> str:
    """How long a run takes, as far as it was measured."""
    if time["verdict"] == "baseline":
        return f"{time['median_ms']:.2f} ms a run"
    between = f"{time['low']:.2f} and {time['high']:.2f}"
    if time["verdict"] == "within noise":
        return f"as long as the baseline, within noise (between {between} times)"
    if time["verdict"] == "unresolved":
        return f"somewhere between {between} times as long as the baseline, which this measurement cannot tell apart"
    return f"{time['ratio']:.2f} times as long as the baseline (between {between})"


def _unknown(report: Mapping[str, Any]) -> Iterator[str]:
    if report["plan"] and report["model"]:
        model = PurePath(report["model"]).name
        yield f"Whether it learns better was not measured: laurel-rewrite compare {model} --plan plan.toml --tokens 1M trains and judges it."
