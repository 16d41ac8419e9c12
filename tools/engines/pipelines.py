"""Pipelines of two stages, with several micro-batches in flight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline

from laurel_rewrite.backends.module.surgery import rewriting_of
from laurel_rewrite.training.pipeline import connect_stage
from tools.engines.case import Case, Result, gradients
from tools.engines.table import engine

PARTS = 4  # micro-batches
LONGEST = 16
CUTS = (0, 1), (1, 4)
"""The blocks of each stage."""


class Stage(nn.Module):
    """Some of a Llama's blocks, with what comes before the first and after the last."""

    def __init__(self, model: Any, first: int, last: int) -> None:
        super().__init__()
        inner = model.model
        angles = inner.rotary_emb(torch.zeros(1), torch.arange(LONGEST).unsqueeze(0))
        self.register_buffer("cos", angles[0])
        self.register_buffer("sin", angles[1])
        self.embed_tokens = inner.embed_tokens if first == 0 else None
        self.layers = nn.ModuleDict({str(place): inner.layers[place] for place in range(first, last)})
        ends = last == len(inner.layers)
        self.norm, self.lm_head = (inner.norm, model.lm_head) if ends else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        angles = self.cos[:, : x.shape[1]], self.sin[:, : x.shape[1]]
        for block in self.layers.values():
            x = block(x, attention_mask=None, position_embeddings=angles)
        return x if self.norm is None else self.lm_head(self.norm(x))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def scheduled(case: Case, module: nn.Module, stage: Any, schedule: type) -> Result:
    """One step, and the gradients of this process's stage."""
    runs = schedule(stage, PARTS, loss_fn=loss_of)
    losses: list[Tensor] = []
    runs.step(*(() if distributed.get_rank() else (case.ids,)), target=case.ids, losses=losses)
    return Result(torch.stack(losses).mean().item() if losses else None, of_stage(module))


def of_stage(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of a stage by the names in the model."""
    return {name if name.startswith("lm_head") else f"model.{name}": gradient for name, gradient in gradients(module).items()}


def by_hand(case: Case, schedule: type) -> Result:
    model = case.model
    rank = distributed.get_rank()
    module = connect_stage(Stage(model, *CUTS[rank]), rewriting_of(model).plan)
    return scheduled(case, module, PipelineStage(module, rank, 2, torch.device("cpu")), schedule)


@engine("pipeline by hand, GPipe", "`PipelineStage` of modules that `connect_stage` connected; 4 micro-batches", processes=2)
def gpipe(case: Case) -> Result:
    return by_hand(case, ScheduleGPipe)


@engine("pipeline by hand, 1F1B", "the same, forward and backward passes in turns", processes=2)
def one_forward_one_backward(case: Case) -> Result:
    return by_hand(case, Schedule1F1B)


ALONE = dict.fromkeys(("window", "whole history", "wide stream"), "a pipeline stage without the blocks before it")


@engine("stages without connect_stage", "the same stages as they are, each of a copy of the model", refuses=ALONE)
def alone(case: Case) -> Result:
    first, second = (Stage(case.model, *cut) for cut in CUTS)
    loss = loss_of(second(first(case.ids)), case.ids)
    loss.backward()
    return Result(loss.item(), of_stage(first) | of_stage(second))


@engine(
    "pipeline, traced", "`torch.distributed.pipelining.pipeline` splits the model's graph, in which states are edges; 1F1B", processes=2
)
def traced(case: Case) -> Result:
    rank = distributed.get_rank()
    whole = Stage(case.model, 0, CUTS[-1][-1])
    split = pipeline(whole, mb_args=(case.ids.chunk(PARTS)[0],), split_spec={f"layers.{CUTS[-1][0]}": SplitPoint.BEGINNING})
    return scheduled(case, split.get_stage_module(rank), split.build_stage(rank, torch.device("cpu")), Schedule1F1B)
