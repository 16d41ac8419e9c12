"""Connections in fx graphs, those of exported programs, too: the pass that inserts them, and the proof around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from laurel_rewrite.backends import Applied, BackEnd
from laurel_rewrite.backends.module.proof import Evidence, Proof, failure
from laurel_rewrite.backends.module.surgery import copied
from laurel_rewrite.detection.sites import Sites
from laurel_rewrite.passes.insert_laurel import InsertLaurel
from laurel_rewrite.plan import Plan


class FxBackEnd(BackEnd):
    """An `fx.GraphModule` whose nodes carry shapes.

    Args:
        model: the graph.
        sites: of it.
        args, kwargs: inputs of its forward, for the proof.
        inplace: change the graph itself; else a copy.
        verify: whether to prove the result.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        sites: Sites,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        inplace: bool = False,
        verify: bool = True,
    ) -> None:
        self.model, self.sites, self.args, self.kwargs = model, sites, args, dict(kwargs or {})
        self.inplace, self.verify = inplace, verify

    def check(self, plan: Plan) -> None:
        InsertLaurel(plan).requires(self.model)

    def apply(self, plan: Plan) -> Applied:
        self.check(plan)
        proof = Proof(self.model, self.args, self.kwargs, plan.seed) if self.verify else None
        target = copied(self.model)
        assert isinstance(target, fx.GraphModule)
        InsertLaurel(plan)(target)
        evidence = proof.of(target, plan, {}) if proof is not None else Evidence()
        if proof is not None and evidence.failed and not proof.steady(self.model, evidence):
            raise failure(evidence, "")
        return Applied(InsertLaurel(plan)(self.model).graph_module if self.inplace else target, plan, tuple(evidence.checks))
