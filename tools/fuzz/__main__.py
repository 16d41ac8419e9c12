"""Try random cases until the time is out: `python -m tools.fuzz --seconds 600 --state fuzz.json`.

Each module beside this one that has a function `run(seed)` is a kind of case; it returns what sort of case the seed was, or raises.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from laurel_rewrite.profiling import processor

FOLDER = Path(__file__).parent
KINDS = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef run(seed: int)" in path.read_text())
SAVE_EVERY = 5.0  # seconds


@dataclass
class Kind:
    """How far one kind of case has come.

    Attributes:
        next: the first seed that was not tried yet.
        counts: tried cases by sort.
        failed: the first line of the error of each seed that failed.
        seconds: spent on all of them.
    """

    next: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def load(self, data: dict[str, Any]) -> None:
        self.next, self.counts, self.seconds = data["next"], Counter(data["counts"]), data["seconds"]
        self.failed = {int(seed): error for seed, error in data["failed"].items()}


class Fuzzing:
    """Cases of several kinds, each with the same share of the time.

    Args:
        kinds: names out of `KINDS`.
        state: a file to go on from and to write, or None.
    """

    def __init__(self, kinds: Iterable[str], state: Path | None) -> None:
        self.state = state
        self.all = {name: Kind() for name in KINDS}
        if state is not None and state.exists():
            for name, data in json.loads(state.read_text()).items():
                self.all.setdefault(name, Kind()).load(data)
        self.kinds = {name: self.all[name] for name in kinds}
        self.runs: dict[str, Callable[[int], str]] = {name: importlib.import_module(f"tools.fuzz.{name}").run for name in self.kinds}
        self._saved = time.monotonic()

    def go(self, seconds: float) -> None:
        """Try new seeds; the kind that had the least time is next."""
        spent = dict.fromkeys(self.kinds, 0.0)
        start = time.monotonic()
        while (now := time.monotonic()) - start < seconds:
            name = min(spent, key=lambda name: spent[name])
            self.try_one(name, self.kinds[name].next)
            self.kinds[name].next += 1
            spent[name] += time.monotonic() - now
            if now - self._saved > SAVE_EVERY:
                self.save()

    def again(self) -> None:
        """Try the seeds that failed once more; what passes now counts as tried."""
        for name, kind in self.kinds.items():
            for seed in list(kind.failed):
                self.try_one(name, seed)
                self.save()

    def try_one(self, name: str, seed: int) -> None:
        kind = self.kinds[name]
        start = time.monotonic()
        try:
            kind.counts[self.runs[name](seed)] += 1
            kind.failed.pop(seed, None)
        except Exception as error:
            kind.failed[seed] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"{name} {seed}: {kind.failed[seed]}\n    python -c 'from tools.fuzz.{name} import run; run({seed})'", flush=True)
        kind.seconds += time.monotonic() - start

    def save(self) -> None:
        """Write the state, whole or not at all."""
        if self.state is not None:
            draft = self.state.with_name(self.state.name + ".draft")
            draft.write_text(json.dumps({name: vars(kind) for name, kind in self.all.items()}, indent=1))
            os.replace(draft, self.state)
        self._saved = time.monotonic()

    def table(self) -> str:
        rows = []
        for name, kind in self.kinds.items():
            rows.append((name, kind.counts.total() + len(kind.failed)))
            rows += [(f"    {sort}", count) for sort, count in sorted(kind.counts.items(), key=lambda pair: (-pair[1], pair[0]))]
            rows.append(("    failed", len(kind.failed)))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}} {count:>7,}" for name, count in rows)

    def report(self) -> str:
        """All that was tried so far, in Markdown."""
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxruntime"))
        lines = [
            f"# Random cases, {date.today()}",
            "",
            f"Python {platform.python_version()}, {packages}; {processor()}. `python -m tools.fuzz --state ... --report ...`, over as many runs as it took: "
            "seeds go on where the last run stopped, and seeds that failed were tried again after each mend.",
            "",
            "| kind | cases | next seed | seconds a case | failed | sorts |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for name, kind in self.all.items():
            tried = kind.counts.total() + len(kind.failed)
            sorts = ", ".join(f"{sort} {count:,}" for sort, count in sorted(kind.counts.items(), key=lambda pair: (-pair[1], pair[0])))
            lines.append(f"| {name} | {tried:,} | {kind.next} | {kind.seconds / max(tried, 1):.2f} | {len(kind.failed)} | {sorts} |")
        return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="the time; the case that runs then is finished (default: %(default)s)")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="what to try (default: all)")
    parser.add_argument("--state", type=Path, help="a file to go on from, and to keep seeds, counts and failures in")
    parser.add_argument("--from", type=int, dest="first", metavar="SEED", help="the first seed, in place of the state's")
    parser.add_argument("--again", action="store_true", help="try the seeds that failed once more, and no new ones")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write all counts of the state as a table in Markdown")
    options = parser.parse_args()
    fuzzing = Fuzzing(options.kind, options.state)
    if options.first is not None:
        for kind in fuzzing.kinds.values():
            kind.next = options.first
    try:
        fuzzing.again() if options.again else fuzzing.go(options.seconds)
    except KeyboardInterrupt:
        print("interrupted")
    fuzzing.save()
    print(fuzzing.table())
    if options.report is not None:
        options.report.write_text(fuzzing.report())
    return int(any(kind.failed for kind in fuzzing.kinds.values()))


if __name__ == "__main__":
    sys.exit(main())
