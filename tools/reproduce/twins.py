"""Does the comparison tell apart what differs, and nothing else?

    python -m tools.reproduce.twins [--sets 20] [--seeds 3] [--tokens 40000]      # about a quarter of an hour; writes a dated table

A small GPT is compared with a twin from other weights, which must be not told apart, and with one that is trained at a tenth of the learning rate,
which must be worse; each set of seeds is a table of its own. Stopped, the same command goes on.
"""

from __future__ import annotations

from collections import Counter
from datetime import date
from pathlib import Path

import click
import torch

from laurel_rewrite.lab.candidates import UNCHANGED, Candidate, twin
from laurel_rewrite.lab.comparing import compare
from laurel_rewrite.lab.comparison import Comparison
from laurel_rewrite.lab.judging import ALIKE, WORSE, Judgement, judged

HERE = Path(__file__).parent
MODEL = HERE.parent / "examples" / "gpt.py"
SETTINGS = {"width": 64, "depth": 3, "heads": 4, "vocabulary": 256, "dropout": 0.0}
SLOW = Candidate("a tenth of the learning rate", rate=0.1)
EXPECTED = {twin().name: ALIKE, SLOW.name: WORSE}


def tables(found: Comparison, sets: int, seeds: int) -> list[list[Judgement]]:
    """What each set of seeds says by itself."""
    (rate,) = found.rates
    return [
        judged(
            {
                candidate.name: {seed: run.judge for seed, run in found.of(candidate.name, rate).items() if seed // seeds == number}
                for candidate in found.candidates
            },
            UNCHANGED,
        )
        for number in range(sets)
    ]


@click.command()
@click.option("--sets", default=20, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Of a set.")
@click.option("--tokens", default=40_000, show_default=True)
@click.option("--folder", default=Path("laurel_twins"), type=click.Path(path_type=Path), show_default=True, help="Of the comparison.")
@click.option("--out", default=HERE.parent / "results" / f"twins-{date.today()}.md", type=click.Path(path_type=Path))
def main(sets: int, seeds: int, tokens: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    found = compare(
        str(MODEL), settings=SETTINGS, variants=(), candidates=[twin(), SLOW], one_more_layer=False, seeds=range(sets * seeds), tokens=tokens,
        rates=3e-3, length=64, profile_seconds=0, out=folder,
    )  # fmt: skip
    verdicts = {name: Counter[str]() for name in EXPECTED}
    rows = []
    for number, table in enumerate(tables(found, sets, seeds)):
        for judgement in table[1:]:
            verdicts[judgement.name][judgement.verdict] += 1
            interval = f"{judgement.difference:+.4f} [{judgement.low:+.4f}, {judgement.high:+.4f}]"
            rows.append(f"| {number} | {judgement.name} | {interval} | {judgement.corrected:.3f} | {judgement.verdict} |")
    about = found.about
    summary = [
        f"* {name}: {EXPECTED[name]!r} in {counts[EXPECTED[name]]} of {sets} sets ({', '.join(f'{n} {verdict}' for verdict, n in counts.items())})."
        for name, counts in verdicts.items()
    ]
    text = [
        f"# A model against its twins, {date.today()}", "",
        f"A GPT of {found.sizes[UNCHANGED].parameters:,} parameters ({', '.join(f'{k} {v}' for k, v in SETTINGS.items())}), {tokens:,} tokens of "
        f"{about['data']['name']} (digest {about['data']['digest'][:16]}), {sets} sets of {seeds} seeds, learning rate 3e-3; "
        f"torch {about['versions']['torch']}, one thread.", "", *summary, "",
        "| set | twin | difference of loss [95 %] | p, after Holm | verdict |", "|---:|---|---|---:|---|", *rows, "",
    ]  # fmt: skip
    out.write_text("\n".join(text))
    click.echo("\n".join(summary))


if __name__ == "__main__":
    main()
