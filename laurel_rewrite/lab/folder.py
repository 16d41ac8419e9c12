"""The folder of a comparison: what all its runs have in common, and a file for each that ended.

comparison.json     what all runs have in common: a folder with another one is refused
runs/               a file for each run that ended
weights/            those of each candidate from the first seed, for `inspect`
graphs.json         what the candidates cost in onnxruntime
inside.json         what was seen inside them
search/             runs of a search, likewise
plan.toml           of the best that it found
state/              of the run that has not ended
data/               tokens
report.html, report.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from laurel_rewrite.backends.module.weights import write_weights
from laurel_rewrite.errors import ConfigError
from laurel_rewrite.files.checked import read_json
from laurel_rewrite.files.written import plain, write_json
from laurel_rewrite.lab.candidates import Candidate
from laurel_rewrite.lab.comparison import Key, slug
from laurel_rewrite.lab.runs import Run

ABOUT, RUNS, WEIGHTS, STATE, SEARCH, GRAPHS, INSIDE = (
    "comparison.json", "runs", "weights", "state", "search", "graphs.json", "inside.json",
)  # fmt: skip
PLAN = "plan.toml"
_FORMAT = 1


def begin(out: Path, about: Mapping[str, Any], tokenizer: Path | None) -> None:
    """Say what all runs of a folder have in common."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / ABOUT, {"format": _FORMAT, **about, "tokenizer": None if tokenizer is None else str(tokenizer.absolute())})


def check(out: Path, about: Mapping[str, Any]) -> None:
    """ConfigError where a folder holds another comparison."""
    if not (out / ABOUT).exists():
        if (out / RUNS).exists():
            raise ConfigError(f"{out} has runs and no {ABOUT}, which says what they are. Choose another folder with --out.")
        return
    earlier = read_json(out / ABOUT, "The comparison")
    for name, value in about.items():
        if earlier.get(name) != value:
            raise ConfigError(
                f"{out} holds a comparison with another {_difference(name, earlier.get(name), value)}. Its runs and new ones cannot be "
                "compared: choose another folder with --out."
            )


def known_runs(folder: Path, candidates: Iterable[Candidate], rates: Iterable[float], seeds: Iterable[int]) -> dict[Key, Run]:
    """The runs of earlier calls.

    Raises:
        ConfigError: one is of another candidate of the same name.
    """
    keys = ((candidate, rate, seed) for candidate in candidates for rate in rates for seed in seeds)
    found = {(one.name, rate, seed): known_run(folder, one, rate, seed) for one, rate, seed in keys}
    return {key: run for key, run in found.items() if run is not None}


def known_run(folder: Path, candidate: Candidate, rate: float, seed: int) -> Run | None:
    """A run of an earlier call, see `known_runs`."""
    file = folder / RUNS / f"{slug((candidate.name, rate, seed))}.json"
    if not file.is_file():
        return None
    data, asked = read_json(file, "The run"), plain(candidate.to_dict())
    if data["candidate"] != asked:
        raise ConfigError(f"{file} is of another {candidate.name!r}: {_difference('candidate', data['candidate'], asked)}.")
    return Run.from_dict(data["run"])


def keep(folder: Path, candidate: Candidate, rate: float, run: Run, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a run that ended, and its weights before it."""
    name = slug((candidate.name, rate, run.seed))
    if weights is not None:
        (folder / WEIGHTS).mkdir(exist_ok=True)
        write_weights(dict(weights), folder / WEIGHTS / f"{name}.safetensors")
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    write_json(folder / RUNS / f"{name}.json", {"candidate": candidate.to_dict(), "base_rate": rate, "run": run.to_dict()})


def recalled(file: Path, name: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier call computed for a name, see `remembered`; None where it did not, or where that was of something else."""
    entry = read_json(file, "What is kept of a comparison").get(name) if file.is_file() else None
    return dict(entry["found"]) if entry is not None and entry["asked"] == plain(asked) else None


def remembered(
    file: Path,
    name: str,
    asked: Mapping[str, Any],
    computed: Callable[[], Mapping[str, Any]],
    fits: Callable[[Mapping[str, Any]], bool] = lambda found: True,
) -> dict[str, Any]:
    """What was computed for a name in an earlier call, or is now and is kept.

    Args:
        file: of all names.
        name: of one.
        asked: what it depends on; of something else it is computed anew.
        computed: the new value, of what JSON holds.
        fits: whether an earlier value will do.
    """
    found = recalled(file, name, asked)
    if found is not None and fits(found):
        return found
    found = dict(plain(computed()))
    known = read_json(file, "What is kept of a comparison") if file.is_file() else {}
    write_json(file, known | {name: {"asked": asked, "found": found}})
    return found


def _difference(name: str, old: Any, new: Any) -> str:
    """Where two values differ first, in words."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        key = next(key for key in [*new, *old] if old.get(key) != new.get(key))
        return _difference(f"{name}, {key}", old.get(key), new.get(key))
    return f"{name}: {str(old)[:60]}, not {str(new)[:60]}"
