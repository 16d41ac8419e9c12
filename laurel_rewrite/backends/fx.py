"""Connections in fx graphs, those of exported programs, too: the pass that inserts them, and the proof around it."""

from __future__ import annotations

from torch import fx

from laurel_rewrite.backends import Applied
from laurel_rewrite.backends.module.surgery import copied
from laurel_rewrite.backends.proof import Evidence, TorchBackEnd, failure
from laurel_rewrite.passes.insert_laurel import InsertLaurel
from laurel_rewrite.plan import Plan


class FxBackEnd(TorchBackEnd):
    """An `fx.GraphModule` whose nodes carry shapes."""

    model: fx.GraphModule

    def check(self, plan: Plan) -> None:
        InsertLaurel(plan).requires(self.model)

    def apply(self, plan: Plan) -> Applied:
        self.check(plan)
        proof = self.proof(plan)
        target = copied(self.model)
        assert isinstance(target, fx.GraphModule)
        InsertLaurel(plan)(target)
        evidence = proof.of(target, plan, {}) if proof is not None else Evidence()
        if proof is not None and evidence.failed and not proof.steady(self.model, evidence):
            raise failure(evidence, "")
        return Applied(InsertLaurel(plan)(self.model).graph_module if self.inplace else target, plan, tuple(evidence.checks))
