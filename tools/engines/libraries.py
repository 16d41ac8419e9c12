"""What people train transformers with: PEFT below and above, and transformers' Trainer."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import nn

from laurel_rewrite.operators.connections import sites_of
from tools.engines.case import Case, Result, gradients, loss_of
from tools.engines.table import engine

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=TARGETS, **options)


def beside_loras(model: nn.Module, case: Case) -> Result:
    """Everything trains. LoRA's B is 0 at the start, so that all other gradients are those of the model without it, and B's follow from those."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("original_module" not in name)
    loss = loss_of(model, case.ids)
    loss.backward()
    found = gradients(model, "base_model.model.")
    for name, gradient in found.items():
        if ".lora_B." in name:
            module = model.get_submodule("base_model.model." + name.partition(".lora_B.")[0])
            weight = found[name.partition(".lora_B.")[0] + ".base_layer.weight"]
            expected = module.scaling["default"] * weight @ module.lora_A["default"].weight.T
            torch.testing.assert_close(
                gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            )  # float32, products of products
    plain = {name.replace(".base_layer", "").replace(".modules_to_save.default", ""): g for name, g in found.items() if "lora_" not in name}
    return Result(loss.item(), plain)


@engine("PEFT LoRA on top", "`get_peft_model` of the rewritten model")
def on_top(case: Case) -> Result:
    from peft import get_peft_model

    return beside_loras(get_peft_model(case.model, lora()), case)


@engine("PEFT LoRA on top, connections in modules_to_save", '`modules_to_save=["laurel_0", "laurel_1"]`; then `merge_and_unload`')
def on_top_and_saved(case: Case) -> Result:
    from peft import get_peft_model

    model = get_peft_model(case.model, lora(modules_to_save=["laurel_0", "laurel_1"]))
    result = beside_loras(model, case)
    before = loss_of(model, case.ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(loss_of(merged, case.ids), before, rtol=1e-5, atol=0)  # float32
    return result


@engine("PEFT LoRA underneath", "the rewrite of a PEFT model; then `merge_and_unload`")
def underneath(case: Case) -> Result:
    from peft import get_peft_model

    model = case.rewrite(get_peft_model(case.base, lora())).train()
    ours, right = sites_of(model), sites_of(case.model)
    for path, connection in right.items():
        ours[f"base_model.model.{path}"].load_state_dict(connection.state_dict())
    result = beside_loras(model, case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    before = loss_of(model, case.ids)
    merged = model.merge_and_unload()
    assert len(sites_of(merged)) == len(right)
    torch.testing.assert_close(loss_of(merged, case.ids), before, rtol=1e-5, atol=0)  # float32
    return result


@engine("transformers' Trainer", "two steps of AdamW, whose weights are those of a loop of one's own")
def trainer(case: Case) -> Result:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model = case.model
    first: list[dict[str, torch.Tensor]] = []

    class Reading(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            first.append(gradients(model))

    loop = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(loop.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.0)
    for _ in range(2):
        optimiser.zero_grad()
        loss_of(loop, case.ids).backward()
        optimiser.step()
    rows = [{"input_ids": row, "labels": row} for row in case.ids]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=len(rows), learning_rate=1e-3, adam_epsilon=1e-3, lr_scheduler_type="constant",
            max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        running = Trainer(model, arguments, train_dataset=rows, callbacks=[Reading()])
        running.remove_callback(PrinterCallback)
        running.train()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, loop.get_parameter(name), rtol=1e-4, atol=1e-5)  # float32, the rows in another order
    return Result(running.state.log_history[0]["loss"], first[0])
