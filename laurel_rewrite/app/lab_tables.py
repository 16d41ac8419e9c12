"""What a person sees of a comparison, of a search, and of the inside of a trained model."""

from __future__ import annotations

import math
from collections import Counter

from rich.console import Console
from rich.text import Text

from laurel_rewrite.app.tables import show_table
from laurel_rewrite.lab.comparison import Comparison
from laurel_rewrite.lab.inside import Difference, SiteInside
from laurel_rewrite.lab.inspecting import Looked
from laurel_rewrite.lab.judging import BASELINE, BETTER, FAILED, WORSE, Judgement
from laurel_rewrite.lab.trials import Search
from laurel_rewrite.report.words import shortened

_TRIALS = 10


def show_comparison(console: Console, comparison: Comparison) -> None:
    """The table of a comparison: what each candidate came to, and what may be said of it; before it what was searched."""
    if comparison.search is not None:
        _show_search(console, comparison.search)
    if not comparison.runs:
        return
    about, several = comparison.about, len(comparison.rates) > 1
    timed = any(size.latency is not None for size in comparison.sizes.values())
    rows: list[tuple[str | Text, ...]] = [
        (
            f"{row.name}\nlr {row.rate:g}" if several else row.name, *_judged(row.judgement),
            row.needed,
            f"{row.size.parameters:,}\n{row.parameters:.3f}", f"{row.flops:.3f}", f"{row.seconds:.3f}",
            *([_latency(row.size.latency)] if timed else []),
        )
        for row in comparison.rows()
    ]  # fmt: skip
    seeds = max((row.judgement.seeds for row in comparison.rows()), default=0)
    caption = (
        f"{about['recipe']['tokens']:,} {about['task']['unit']} of {about['data']['name']} ({about['data']['digest'][:12]}), {about['task']['objective']}; "
        f"{seeds} of {len(comparison.seeds)} seeds; loss on the third split, difference paired by seed, probability after Holm; needed: of these "
        f"{about['task']['unit']}, what the baseline needs for the same loss on the second split"
    )
    headings = (
        "model",
        "loss>",
        "difference\n[95 %]>",
        "p>",
        "verdict",
        "needed>",
        "parameters>",
        "FLOPs>",
        "step>",
        *(["latency>"] if timed else []),
    )
    show_table(console, f"Comparison of {about['model']}", headings, rows, caption)
    for note in comparison.notes:
        console.print(Text(note, style="yellow"))
    for row in comparison.rows():
        for seed, text in row.failures.items():
            console.print(Text(f"{row.name}, seed {seed}: {text}", style="yellow"))


def _show_search(console: Console, search: Search) -> None:
    counts = Counter(trial.state for trial in search.trials)
    ordered = sorted(
        search.trials, key=lambda trial: (trial.excess > 0, -trial.tokens, math.inf if trial.loss is None else trial.loss, trial.excess)
    )
    rows = [
        (
            trial.candidate.name, trial.state, "" if trial.loss is None else _number(trial.loss, "{:.4f}"),
            "" if trial.difference is None else _signed(trial.difference), f"{trial.tokens:,}" if trial.tokens else "",
            "\n".join(f"{name} {value:.4g}" for name, value in trial.figures.items()),
        )
        for trial in ordered[:_TRIALS]
    ]  # fmt: skip
    caption = (
        f"{', '.join(f'{number} {state}' for state, number in counts.items())}, of {search.choices} candidates; within "
        f"{' and '.join(search.budgets) or 'no budget'}; loss on the second split, and less the unchanged model's after the same tokens, which comes to "
        f"{search.baseline:.4f}{'; of latencies the upper end of the interval' if 'latency' in ' '.join(search.budgets) else ''}"
    )
    headings = ("candidate", "state", "loss>", "difference>", "tokens>", "costs")
    show_table(console, f"Search, the best {len(rows)}", headings, rows, caption)


def show_inside(console: Console, looked: Looked) -> None:
    """A trained model site by site."""
    found = looked.inside
    rows = [
        (
            shortened(site.site, 40), _learned(site), _number(site.skip, "{:.2f}"), _number(site.branch, "{:.2f}"), _number(site.branch_cosine, "{:+.2f}"),
            _number(100 * site.share, "{:.1f} %"), _worth(site.without_branch, False),
            _worth(site.plain, site.site in looked.gaining) if site.plain is not None else Text("whole stream"),
        )
        for site in found.sites
    ]  # fmt: skip
    caption = (
        f"loss {found.loss:.4f} on {found.batches} batches of the third split, {_signed(found.plain.loss)} with plain sums everywhere; rms of skip and "
        f"branch, their cosine, share of the final state; the loss more without the branch, and with x + f for the operator, ± its standard error"
    )
    headings = ("site", "learned", "skip>", "branch>", "cosine>", "share>", "without\nbranch>", "plain\nsum>")
    show_table(console, f"Inside {looked.name}, lr {looked.rate:g}, seed {looked.seed}", headings, rows, caption)
    gains = f"{len(looked.gaining)} of {len(found.sites)} sites gain by more than two standard errors"
    console.print(Text(f"{gains}: {', '.join(looked.gaining)}" if looked.gaining else gains))


def _latency(found: tuple[float, float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.3f}\n[{found[1]:.3f}, {found[2]:.3f}]"


def _learned(site: SiteInside) -> str:
    shown = [f"{name} {value:.3f}" for name, value in list(site.learned.items())[:6]]
    spectra = [f"s({name}) {values[0]:.3f}" for name, values in site.singular_values.items() if values][:1]
    words = [*shown, *spectra]
    return "\n".join(", ".join(words[n : n + 3]) for n in range(0, len(words), 3))


def _worth(found: Difference, gains: bool) -> Text:
    return Text(f"{_signed(found.loss)}\n± {_number(found.error, '{:.4f}')}", "green" if gains else "")


def _signed(value: float) -> str:
    return _number(value, "{:+.4f}")


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "-"


def _judged(found: Judgement) -> tuple[str, str, str, Text]:
    interval = f"\n[{found.low:+.4f}, {found.high:+.4f}]" if math.isfinite(found.low) else ""
    difference = "" if found.verdict == BASELINE or not math.isfinite(found.difference) else f"{found.difference:+.4f}{interval}"
    style = {BETTER: "green", WORSE: "red", FAILED: "red"}.get(found.verdict, "")
    p = f"{found.corrected:.3f}" if math.isfinite(found.corrected) else ""
    return f"{found.mean:.4f}" if math.isfinite(found.mean) else "", difference, p, Text(found.verdict, style)
