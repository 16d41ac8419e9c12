"""Processes of a gloo group that try one cell after the other."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from tools.engines.case import CLASSES, Case

START, CELL = 120.0, 120.0
"""Seconds that the processes have to start, and for one cell: what takes longer hangs."""
PATIENCE = 3.0
"""Seconds that one process has when the other has failed."""


class Ranks:
    """A group of processes, started when it is first needed and anew after a failure.

    Args:
        count: how many.
    """

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.running: list[tuple[Any, Any]] = []
        self.packed: set[str] = set()

    def run(self, engine: str, operator: str) -> list[tuple[str, object]]:
        """What each process came to; see `tools.engines.table.tried`.

        Raises:
            TimeoutError: a process hangs or died.
        """
        if not self.running:
            self._start()
        packed = None if operator in self.packed else Case(operator).packed()
        self.packed.add(operator)
        for _, pipe in self.running:
            pipe.send((engine, operator, packed))
        outcomes: list[tuple[str, object]] = []
        patience = CELL
        try:
            # The one that has failed first says why; the others may wait for it in vain.
            waiting = [pipe for _, pipe in self.running]
            while waiting:
                ready = multiprocessing.connection.wait(waiting, timeout=patience)
                if not ready:
                    break
                for pipe in ready:
                    outcomes.append(pipe.recv())
                    waiting.remove(pipe)
                if outcomes[-1][0] != "works":
                    patience = PATIENCE
        except EOFError:
            self.close()
            raise TimeoutError("a process died") from None
        if len(outcomes) < self.count or len({kind for kind, _ in outcomes} - {"failed"}) != 1:  # they are no longer at the same place
            self.close()
        if not outcomes or (len(outcomes) < self.count and all(kind == "works" for kind, _ in outcomes)):
            raise TimeoutError(f"a process did not end within {patience:.0f} seconds")
        return outcomes

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.count, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self.running.append((process, ours))
        for _, pipe in self.running:
            if not pipe.poll(START):
                self.close()
                raise TimeoutError(f"the processes did not start within {START:.0f} seconds")
            pipe.recv()

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self.running:
            pipe.close()
            process.kill()
            process.join()
        self.running, self.packed = [], set()


def _serve(rank: int, count: int, store: str, pipe: Any) -> None:
    """One process: cells come through the pipe."""
    warnings.simplefilter("ignore")
    import torch
    from torch import distributed

    from tools.engines.table import engines, tried

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=CELL))
    known = engines()
    pipe.send("ready")
    while True:
        try:
            engine, operator, packed = pipe.recv()
        except (EOFError, OSError):
            return
        CLASSES.setdefault(operator, operator)  # any operator may stand for itself
        if packed is not None:
            Case(operator).unpack(packed)
        torch.manual_seed(0)
        torch._dynamo.reset()
        pipe.send(tried(known[engine], operator))
