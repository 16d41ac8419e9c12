"""`laurel_out/`: source a person can read, weights, plan and configuration; and back, without tracing."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from laurel_rewrite import __version__
from laurel_rewrite.backends.module.functions import name_of, unheard
from laurel_rewrite.backends.module.modeling import source_of
from laurel_rewrite.backends.module.origin import Origin, base_model, check_names, keep_origin, origin_of, read_origin, unpickled
from laurel_rewrite.backends.module.saved_folder import (
    CONFIG,
    FORMAT,
    KEPT,
    MODELING,
    OPERATORS,
    PLAN,
    check_size,
    check_whole,
    importable,
    is_edited,
    read_config,
)
from laurel_rewrite.backends.module.surgery import Rewriting, install, keep_record, original_class, rewriting_of, unwrapped
from laurel_rewrite.backends.module.weights import (
    by_one_process,
    is_sharded,
    load_connections,
    load_weights,
    of_connections,
    whole_weights,
    write_weights,
)
from laurel_rewrite.backends.module.written import check_owners, classes_of, imported
from laurel_rewrite.errors import ConfigError, nearest
from laurel_rewrite.files.checked import read_text, shown
from laurel_rewrite.files.drafts import reading, replacing
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import refuse_second_time
from laurel_rewrite.operators.prepared import prepare
from laurel_rewrite.plan import Plan
from laurel_rewrite.sources.built import Built

GRAPH = "model.pt"
_log = logging.getLogger(__name__)


def save(
    model: nn.Module,
    folder: Path | str,
    *,
    built: Built | None = None,
    factory: str | None = None,
    weights: str = "all",
    state_dict: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a rewritten model so that `load` can build it anywhere.

    A model that is sharded over processes (FSDP, tensor parallel) is gathered, and written by the first of them; all must call this.

    Args:
        model: what `rewrite` or `load` returned, wrapped and sharded or not.
        folder: is created. An earlier result that nobody changed is replaced as a whole.
        built: how the base model was built, where it is known: then `load` builds it so, from its configuration. Without it, a
            transformers model is built from its own configuration, and any other from a pickle of its modules without weights
            (`skeleton.pt`), for which its classes must be importable where it is loaded.
        factory: instead, "package.module:function": a function without arguments that gives the base model, in a module that also has
            `example_inputs`, as the command takes it.
        weights: "all"; "operators", those of the connections alone (`laurel.safetensors`), for `load(folder, base=model)`; or "none", of
            a model on the meta device, say, for `load(folder, device="meta")` on every process.
        state_dict: weights of the model to write in the place of those that it has, whole or as DTensors.
        force: replace files that are no earlier result, or that were changed since, too.

    Returns:
        The folder, with `modeling_laurel.py`, `model.safetensors`, `plan.toml`, `laurel_config.json` and `laurel_manifest.json`.

    Raises:
        ConfigError: the model was not rewritten, its weights are on the meta device, the state dict is another model's, there is no such
            factory, the folder cannot be written, or it holds files that would be replaced and are no earlier result.
        RewriteError: a class of the model cannot be imported again.
    """
    if isinstance(model, fx.GraphModule):
        raise ConfigError("A rewritten graph has no classes to save. Save the graph with torch.export, or rewrite the module it came from.")
    if weights not in KEPT:
        raise ConfigError(f"weights must be one of {', '.join(KEPT)}, not {weights!r}.")
    record, inner = rewriting_of(model), unwrapped(model)
    text, names = source_of(record, original_class(inner).__name__)
    folder = Path(folder)
    origin = origin_of(inner, built, factory)
    own = record.operator_files()
    operators = {name: f"{OPERATORS}/{file.name}" for name, file in own.items()}
    origin = Origin(origin.recipe, {**origin.files, **{operators[name]: file.read_bytes() for name, file in own.items()}})
    check_names(origin.files)
    config = {
        "format": FORMAT,
        **_versions(),
        "seed": record.plan.seed,
        "class": name_of(original_class(inner)),
        "model": {**origin.recipe, "files": sorted(origin.files)},
        "classes": names,
        "weights": weights,
        "edits": record.edits,
        **({"operators": operators} if operators else {}),
        **({"factors": record.factors} if record.factors else {}),
    }
    for package in ("transformers", "timm", "torchvision"):
        if package in sys.modules:
            config[package] = getattr(sys.modules[package], "__version__", "unknown")
    shared = weights != "none" and is_sharded(model, state_dict)
    values = {} if weights == "none" else whole_weights(model, state_dict)
    with by_one_process(shared=shared) as writes:
        if writes:
            with replacing(folder, "save", force=force) as draft:
                _write(draft / MODELING, text)
                _write(draft / PLAN, record.plan.to_toml())
                if weights != "none":
                    write_weights(of_connections(model, values) if weights == "operators" else values, draft / KEPT[weights])
                for name, content in origin.files.items():
                    (draft / name).parent.mkdir(parents=True, exist_ok=True)
                    (draft / name).write_bytes(content)
                _write(draft / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_graph(module: fx.GraphModule, folder: Path, plan: Plan) -> None:
    """Write a rewritten graph module, pickled, so that `load` finds it; the packages of its modules must be installed there."""
    torch.save(module, folder / GRAPH)
    _write(folder / PLAN, plan.to_toml())
    config = {**_versions(), "seed": plan.seed, "class": name_of(type(module)), "model": {"kind": "graph", "files": [GRAPH]}, "classes": {}}
    _write(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _versions() -> dict[str, str]:
    return {"laurel_rewrite": __version__, "torch": torch.__version__, "python": platform.python_version()}


def load(folder: Path | str, device: torch.device | str | None = None, *, base: nn.Module | None = None) -> nn.Module:
    """Build a saved model: no capture, no tracing.

    The folder's `modeling_laurel.py` is imported, or its `model.pt` unpickled, and so runs; load only what you trust.

    Args:
        folder: what `save` or the command wrote.
        device: of the result; "meta" builds the modules without reading weights: `to_empty` starts the connections, and the rest is for
            the engine to initialise or load. None is the CPU, or where `base` is.
        base: put the connections, with their weights where the folder has any, into this model, which keeps its own: another
            checkpoint of the architecture, or one on the meta device. It is changed itself, and none of the folder's code runs unless it
            was edited.

    Returns:
        The model in train mode, with the saved weights, ready to train.

    Raises:
        ConfigError: the folder is none of ours, a file is missing or damaged, the files were not written together, weights and plan do
            not fit, or it has too few weights and no base is given. An edited source or plan is loaded as it is, and said in the log.
        CaptureError: the folder's code raises.
    """
    with reading(Path(folder)):
        return _load(Path(folder), device, base)


def _load(folder: Path, device: torch.device | str | None, base: nn.Module | None) -> nn.Module:
    meta = device is not None and torch.device(device).type == "meta"
    graph = (folder / CONFIG).is_file() and (folder / GRAPH).is_file() and not (folder / MODELING).is_file()
    needed = (PLAN, CONFIG, GRAPH) if graph else (MODELING, PLAN, CONFIG)
    _check_there(folder, needed)
    config = read_config(folder)
    if graph:
        check_whole(folder, [CONFIG, GRAPH])
        if base is not None:
            raise ConfigError(f"{folder} holds a graph, which goes into no other model.")
        return _load_graph(folder, device)
    weights = KEPT[config["weights"]]
    reads = bool(weights) and not meta
    if reads:
        _check_there(folder, [weights])
    check_whole(folder, [CONFIG, *config["model"]["files"], *([weights] if reads else [])])
    if base is None and not meta and config["weights"] != "all":
        raise ConfigError(
            f"{folder} has {'the weights of the connections alone' if weights else 'no weights'}: give the model that they go into, "
            f'load(folder, base=model), or build it without any, device="meta".'
        )
    for name, file in config["operators"].items():
        if name not in registry.operators():
            registry.load_operators(folder / file)
    plan = Plan.read(folder / PLAN)
    if reads:
        check_size(plan, folder / weights)
    if base is not None:
        return _put_into(base, folder, config, plan, device, reads=reads)
    origin = read_origin(folder, config["model"])
    with importable(folder, origin.files):
        model = base_model(folder, config["model"], meta=meta)
        _put_in(model, folder, config, plan)
    keep_origin(model, origin)
    model.train()
    if meta:
        if config["factors"]:
            _log.warning("%s: %s multiplies weights of the branches once; do so after they are initialised", folder, plan.sites[0].variant)
        return model.to("meta")
    load_weights(model, folder / weights)
    return model if device is None else model.to(device)


def _check_there(folder: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} is not a folder written by laurel-rewrite: {missing[0]} is missing.")


def _put_into(
    base: nn.Module, folder: Path, config: Mapping[str, Any], plan: Plan, device: torch.device | str | None, *, reads: bool
) -> nn.Module:
    """The folder's connections in a model that is there already."""
    refuse_second_time(base)
    _put_in(base, folder, config, plan, by_edits=config["edits"] is not None and not is_edited(folder, MODELING))
    if not any(p.is_meta for p in base.parameters()):
        prepare(base, config["factors"])
        if reads:
            load_connections(base, folder / KEPT[config["weights"]])
    return base if device is None else base.to(device)


def _put_in(model: nn.Module, folder: Path, config: Mapping[str, Any], plan: Plan, *, by_edits: bool = False) -> None:
    """Install a folder's plan in its base model."""
    names, label = config["classes"], str(folder / CONFIG)
    owners = [row.owner for row in plan.sites]
    check_owners(model, names, label)
    _check_places(model, plan, folder / PLAN)
    record = Rewriting(plan, {}, config["edits"], factors=config["factors"])
    if by_edits:
        classes = record.made_again(model, f"{label}, edits")
    else:
        with unheard({type(model.get_submodule(owner)) for owner in names}):
            module = imported(folder / MODELING)
        record.text, record.names = read_text(folder / MODELING, "The source"), names
        record.edits = None if is_edited(folder, MODELING) else record.edits
        classes = classes_of(module, model, owners, names, record.text, str(folder / MODELING))
    install(model, plan, classes)
    keep_record(model, record)


def _check_places(model: nn.Module, plan: Plan, path: Path) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for row in plan.sites:
        for name in (row.owner, row.holder):
            if name not in modules:
                raise ConfigError(f"{path}, site {row.id}: the model has no module {shown(name)}. {nearest(name, modules)}")


def _load_graph(folder: Path, device: torch.device | str | None) -> nn.Module:
    from laurel_rewrite.backends.onnx.converters import onnx2torch

    onnx2torch()  # whose modules were pickled
    return unpickled(folder / GRAPH, device).train()
