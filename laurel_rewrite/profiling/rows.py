"""What was measured of one model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from laurel_rewrite.profiling.attribution import Attribution
from laurel_rewrite.profiling.costs import Costs
from laurel_rewrite.profiling.fusions import Ops
from laurel_rewrite.profiling.latency import Latency
from laurel_rewrite.profiling.memory import Memory


@dataclass(frozen=True)
class Row:
    """One model's figures. Where several shapes of inputs were asked for, all but latencies and memory are those of the first.

    Attributes:
        name: of the file, or what it is.
        path: of the file; "" for what was only made to be measured.
        latencies: for each shape.
        load_ms: median time to make a session, onnxruntime's optimisation included, milliseconds.
        memories: for each shape.
        residents: for each shape, peak resident memory (VmHWM) of a fresh process that loads the model and runs it, in bytes; 0 where the
            system has no such figure.
        file_bytes: the file and its external data.
        ops: before and after onnxruntime's optimisation, and what it fused.
        costs: FLOPs and the like.
        attribution: where the time goes.
        providers: number of nodes by the execution provider that ran them.
    """

    name: str
    path: str
    latencies: tuple[Latency, ...]
    load_ms: float
    memories: tuple[Memory, ...]
    residents: tuple[int, ...]
    file_bytes: int
    ops: Ops
    costs: Costs
    attribution: Attribution
    providers: dict[str, int]

    @property
    def latency(self) -> Latency:
        """For the first shape of inputs."""
        return self.latencies[0]

    @property
    def memory(self) -> Memory:
        """For the first shape of inputs."""
        return self.memories[0]

    @property
    def resident_bytes(self) -> int:
        """For the first shape of inputs."""
        return self.residents[0]

    def to_dict(self, baseline: Row) -> dict[str, Any]:
        nodes = [vars(node) for node in self.attribution.nodes]
        return {
            "name": self.name,
            "path": self.path,
            "latencies": [asdict(one) for one in self.latencies],
            "load_ms": self.load_ms,
            "memories": [
                asdict(memory) | {"resident_bytes": resident} for memory, resident in zip(self.memories, self.residents, strict=True)
            ],
            "file_bytes": self.file_bytes,
            "ops": vars(self.ops),
            "fusions": vars(self.ops.against(baseline.ops)),
            "costs": vars(self.costs) | {"sites": {site: vars(costs) for site, costs in self.costs.sites.items()}},
            "time": {
                "overhead": self.attribution.overhead,
                "by_op": self.attribution.by("op"),
                "by_module": self.attribution.by("module"),
                "sites": [vars(site) for site in self.attribution.sites],
                "left_over_ms": self.attribution.left_over_ms,
                "nodes": nodes,
            },
            "providers": self.providers,
        }
