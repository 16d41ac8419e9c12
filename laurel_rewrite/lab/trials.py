"""What a search tried, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from laurel_rewrite.lab.candidates import Candidate

TRAINED, STOPPED, OVER, FAILED = "trained", "stopped early", "over budget", "failed"
UNMEASURED, UNFIT = "not measured", "does not fit"


@dataclass(frozen=True)
class Trial:
    """One candidate of a search.

    Attributes:
        candidate: what was tried.
        state: one of the words above.
        figures: what the budgets name, and "parameters", the share of them added.
        excess: how far it is above the limit that it misses most, as a share of that; 0 or less is within.
        loss: on the second split, where it came to; None where it was not trained.
        difference: to the unchanged model's there, from the same seed and tokens.
        tokens: that it was trained on.
        problem: what went wrong, in words.
    """

    candidate: Candidate
    state: str
    figures: dict[str, float]
    excess: float
    loss: float | None = None
    difference: float | None = None
    tokens: int = 0
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "candidate": self.candidate.name}


@dataclass
class Search:
    """What came of a search.

    Attributes:
        budgets: limits, as they were given.
        seed, rate: that all trials were trained with; no run of the comparison has this seed.
        baseline: loss of the unchanged model, trained likewise.
        choices: how many candidates there were.
        trials: in the order in which they were tried.
        done: whether it came to its end.
        keep: how many of the best are compared.
    """

    budgets: Sequence[str]
    seed: int
    rate: float
    baseline: float
    choices: int
    keep: int
    trials: list[Trial] = field(default_factory=list)
    done: bool = False

    def of(self, *states: str) -> list[Trial]:
        """The trials in a state."""
        return [trial for trial in self.trials if trial.state in states]

    @property
    def finalists(self) -> list[Candidate]:
        """The best that were trained to the end, the best first."""
        trained = sorted(self.of(TRAINED), key=lambda trial: trial.loss or 0.0)
        return [trial.candidate for trial in trained[: self.keep]]

    @property
    def nearest(self) -> Trial | None:
        """Of those over the budget, the one that is least so; of equal ones the first."""
        return min(self.of(OVER), key=lambda trial: trial.excess, default=None)

    @property
    def failure(self) -> str:
        """Why there is nothing to be compared, in a sentence, with the nearest point where that is a budget."""
        if self.nearest is None:
            problem = next((f": {trial.problem}" for trial in self.trials if trial.problem), "")
            return f"None of {len(self.trials)} candidates could be trained to the end{problem}."
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.nearest.figures.items())
        unresolved = " A latency is judged by the upper end of its interval: a longer --profile-seconds makes that narrower." if any(
            "latency" in name for name in self.nearest.figures
        ) else ""  # fmt: skip
        return (
            f"None of {len(self.trials)} candidates tried, of {self.choices}, is within {' and '.join(self.budgets)}. The nearest is "
            f"{self.nearest.candidate.name} ({figures}).{unresolved}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "trials": [trial.to_dict() for trial in self.trials], "finalists": [one.name for one in self.finalists]}
