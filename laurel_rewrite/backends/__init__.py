"""Where plans are carried out: one interface, and a back end for each form that a model comes in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.plan import Plan
from laurel_rewrite.verification.checks import Check

UNSUPPORTED = ("refuse", "skip")
"""What becomes of a site that cannot be rewritten: an error before anything is changed, or its plain sum stays."""


@dataclass(frozen=True)
class Skipped:
    """A site that kept its plain sum: its id, where it stands, and why."""

    id: str
    where: str
    reason: str


@dataclass(frozen=True)
class Applied:
    """A plan carried out.

    Attributes:
        model: the rewritten model, in the form in which it came.
        plan: what was done; the plan that was given, less the sites that were skipped.
        checks: what was verified, and what could not be.
        skipped: sites that kept their plain sum, with reasons.
    """

    model: Any
    plan: Plan
    checks: tuple[Check, ...] = ()
    skipped: tuple[Skipped, ...] = ()


class BackEnd(ABC):
    """A model in one form, with the sites that were found in it, and how plans are carried out there.

    Attributes:
        sites: what a plan may name.
    """

    sites: Sites

    @abstractmethod
    def check(self, plan: Plan) -> None:
        """See whether a plan can be carried out; nothing changes.

        Raises:
            ConfigError: it names what the model does not have.
            RewriteError: a site stands where it cannot be rewritten.
        """

    @abstractmethod
    def apply(self, plan: Plan) -> Applied:
        """Carry a plan out.

        Raises:
            ConfigError, RewriteError: see `check`; the model is as it was.
            VerificationError: the result would not compute what the model does; likewise.
        """
