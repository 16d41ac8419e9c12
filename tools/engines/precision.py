"""One process in other number formats."""

from __future__ import annotations

import torch

from tools.engines.case import Case, Result, trained
from tools.engines.table import HALF, engine

FLOAT16 = "float16, which has 11 bits, with its loss scaled", 0.05


@engine("autocast bf16", "`torch.autocast`, parameters in float32", tolerance=HALF)
def autocast(case: Case) -> Result:
    with torch.autocast("cpu", torch.bfloat16):
        return trained(case.model, case.ids)


@engine("bf16 parameters", "`model.to(torch.bfloat16)`", tolerance=HALF)
def bfloat16(case: Case) -> Result:
    return trained(case.model.to(torch.bfloat16), case.ids)


@engine("fp16 parameters", "`model.to(torch.float16)`, the loss times 256", tolerance=FLOAT16)
def float16(case: Case) -> Result:
    model, scale = case.model.to(torch.float16), 256.0
    loss = model(input_ids=case.ids, labels=case.ids, use_cache=False).loss
    (loss.float() * scale).backward()
    return Result(loss.item(), {name: p.grad.float() / scale for name, p in model.named_parameters()})
