"""Graphs in files: read with all mistakes said at once and by name, written in one step with the weights where they belong."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from laurel_rewrite.errors import CaptureError, ConfigError, ExportError
from laurel_rewrite.files.checked import inner_name
from laurel_rewrite.files.drafts import replacing
from laurel_rewrite.files.onnx_checks import complaints, first_line, is_unusual, read_proto, refused
from laurel_rewrite.files.onnx_weights import parameters_of

if TYPE_CHECKING:
    import torch

EXTERNAL_DATA = ("reference", "copy")
EXTERNAL_DATA_BYTES = 1 << 30
"""Above this size of its initializers a model gets its weights in a file of their own; protobuf ends at 2 GiB."""
_OURS = {".onnx", ".toml", ".json", ".html", ".py", ".pt", ".safetensors"}
_SMALL = 1024  # bytes; smaller tensors stay in the graph's file


# Reading


def read_graph(path: Path) -> torch.export.ExportedProgram | ir.Model:
    """A .pt2 or .onnx file.

    Raises:
        CaptureError: there is none, or it cannot be read.
    """
    if path.suffix != ".pt2":
        return read_onnx(path)
    from laurel_rewrite.files.pt2 import read_program

    return read_program(path)


def read_onnx(path: Path) -> ir.Model:
    """An ONNX file that onnxruntime can load. Its external weights stay on the disk until somebody asks for them.

    Raises:
        CaptureError: what is wrong with the file, in one sentence.
    """
    from laurel_rewrite.graph.shapes import clean_sizes

    proto = read_proto(path)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:  # onnx-ir's
        raise CaptureError(f"{path} could not be read as an ONNX graph: {first_line(error)}. Is the file complete?") from error
    if not len(model.graph):
        raise CaptureError(f"{path} holds no graph, or one without nodes.")
    try:
        model.graph.sort()
    except ValueError as error:
        raise CaptureError(f"{path}: the graph has a cycle.") from error
    _check_external(model, path)
    _check_valid(model, path, apart=is_unusual(proto))
    clean_sizes(model)
    return model


def external(model: ir.Model) -> list[ir.ExternalTensor]:
    """The tensors of the graph, its subgraphs and its functions whose data lies in other files."""
    found: list[ir.TensorProtocol | None] = []
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        found += [value.const_value for value in graph.initializers.values()] if isinstance(graph, ir.Graph) else []
        for attribute in (attribute for node in graph for attribute in node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR:
                found.append(attribute.as_tensor())
            elif attribute.type == ir.AttributeType.GRAPH:
                graphs.append(attribute.as_graph())
    return [tensor for tensor in found if isinstance(tensor, ir.ExternalTensor)]


def weight_count(model: ir.Model) -> int:
    """Number of parameters in the initializers."""
    return sum(map(parameters_of, model.graph.initializers.values()))


def _check_external(model: ir.Model, path: Path) -> None:
    sizes: dict[Path, int] = {}
    folder = path.parent.resolve()
    for tensor in external(model):
        file = Path(tensor.path)
        if Path(tensor.location).is_absolute() or not file.resolve().is_relative_to(folder):
            raise CaptureError(f"{path}: the weights of {tensor.name!r} lie at {tensor.location!r}, outside the model's folder.")
        if file not in sizes:
            if not file.is_file():
                raise CaptureError(f"{path}: the file {file} with the weights of {tensor.name!r} is missing. Put it beside the model.")
            sizes[file] = file.stat().st_size
        if (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes) > sizes[file]:
            raise CaptureError(f"{path}: {file} ends before the weights of {tensor.name!r} do. Is the file complete?")


def _check_valid(model: ir.Model, path: Path, *, apart: bool) -> None:
    """onnx's checker must pass the file; where that cannot judge, onnxruntime must load it."""
    standard = {"", "ai.onnx", *(function.domain for function in model.functions.values())}
    future = model.opset_imports.get("", 0) > onnx.defs.onnx_opset_version()
    foreign = future or any(node.domain not in standard for node in model.graph.all_nodes())
    complaint, refusal = complaints(path, apart=apart, foreign=foreign)
    if refusal is not None:
        raise CaptureError(f"{path} is no valid ONNX model: {complaint}onnxruntime says: {refusal}.")


# Writing


def write_onnx(model: ir.Model, path: Path | str, *, external_data: str | None = None) -> Path:
    """Write a model in one step: it is complete in its place, or nothing is.

    Args:
        model: its own tensors go into the file, or into `path` + ".data" where they are above 1 GiB or where it has external ones.
        path: of the .onnx file.
        external_data: what becomes of tensors that lie in other files: "reference" refers to these, which the format only allows below
            the folder of `path`; "copy" copies the files beside it, as streams. None refers where that is possible, else copies.

    Returns:
        The path.

    Raises:
        ConfigError: a reference that the format does not allow, or a folder that cannot be written.
        ExportError: the model is no valid ONNX.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"{path} could not be written: there is no folder {path.parent}.")
    with replacing(path.parent) as draft:
        loadable = place_onnx(model, draft / path.name, external_data=external_data)
        if loadable.parent != draft:
            loadable.unlink()
    return path


def place_onnx(model: ir.Model, path: Path, *, external_data: str | None = None) -> Path:
    """Write a model into a draft folder, whose files will be moved to the folder above it, and check it; see `write_onnx`.

    Returns:
        A file that can be loaded before that move: `path` itself, or where weights lie in other files, a twin of it above the draft
        folder, whose references hold now. The caller deletes that one.
    """
    draft, folder = path.parent, path.parent.parent
    model = _with_own_file(model, draft, path.name)
    names: dict[str, tuple[str, str]] = {}  # location as it is -> after the move, before it
    for tensor in external(model):
        location = str(tensor.location)
        if location not in names:
            final, drafted = _settle(Path(tensor.path), location, draft, folder, external_data)
            names[location] = final, f"{draft.name}/{final}" if drafted else final
    try:
        proto = ir.to_proto(model)
    except Exception as error:  # onnx-ir's
        raise ExportError(f"{path.name} could not be written: {first_line(error)}.") from error
    references = [(entry, entry.value) for entry in _locations(proto)]
    loadable = folder / f"{draft.name}-{path.name}" if references else path
    try:
        for file, moment in {loadable: 1, path: 0}.items():
            for entry, location in references:
                entry.value = names[location][moment]
            file.write_bytes(_serialized(proto, path))
        _check_written(loadable, draft, load=not references)
    except BaseException:
        if references:
            loadable.unlink(missing_ok=True)
        raise
    return loadable


def _serialized(proto: onnx.ModelProto, path: Path) -> bytes:
    try:
        data: bytes = proto.SerializeToString(deterministic=True)
        return data
    except Exception as error:  # protobuf's, above 2 GiB
        raise ExportError(f"{path.name} could not be written: {first_line(error)}.") from error


def _with_own_file(model: ir.Model, draft: Path, name: str) -> ir.Model:
    """The model, with its own large tensors in a new file of the draft folder where it is too large for one file, or has others."""
    given = external(model)
    own = [v for v in model.graph.initializers.values() if v.const_value is not None and not isinstance(v.const_value, ir.ExternalTensor)]
    own = [value for value in own if value.const_value is not None and value.const_value.nbytes >= _SMALL]
    if not own or (not given and sum(v.const_value.nbytes for v in own if v.const_value is not None) <= EXTERNAL_DATA_BYTES):
        return model
    taken = {str(tensor.location) for tensor in given}
    file = next(file for n in itertools.count() if (file := f"{name}.data" if not n else f"{name}.{n}.data") not in taken)
    model = model.clone()
    values = [model.graph.initializers[value.name] for value in own if value.name is not None]
    moved = ir.external_data.convert_tensors_to_external([v.const_value for v in values if v.const_value is not None], draft, file)
    for value, tensor in zip(values, moved, strict=True):
        value.const_value = tensor
    return model


def _settle(file: Path, location: str, draft: Path, folder: Path, external_data: str | None) -> tuple[str, bool]:
    """Where a data file will lie below the folder of the model, and whether it lies in the draft folder until then."""
    if file.resolve().is_relative_to(draft.resolve()):
        return str(file.resolve().relative_to(draft.resolve())), True
    reachable = file.resolve().is_relative_to(folder.resolve())
    if external_data == "reference" and not reachable:
        raise ConfigError(
            f"The weights in {file} cannot be referred to from {folder}: ONNX allows no path that leads out of the model's folder. "
            f"Choose --out {file.parent}, or --external-data copy."
        )
    if reachable and (external_data != "copy" or file.resolve() == (folder / location).resolve()):
        return str(file.resolve().relative_to(folder.resolve())), False
    location = os.path.normpath(location)
    if Path(location).suffix in _OURS or not inner_name(location):
        location = f"external/{Path(location).name}"  # not in the place of a result
    try:
        if not (draft / location).exists():  # a model may be placed twice
            (draft / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, draft / location)  # by the kernel, in pieces
    except OSError as error:
        raise ExportError(f"{file} could not be copied to {folder}: {error.strerror}.") from error
    return location, True


def _locations(proto: onnx.ModelProto) -> list[onnx.StringStringEntryProto]:
    """The entries that name the file of an external tensor."""
    entries: list[onnx.StringStringEntryProto] = []
    stack: list[Any] = [proto.graph, *proto.functions]
    while stack:
        graph = stack.pop()
        held = list(getattr(graph, "initializer", ()))
        for node in graph.node:
            for attribute in node.attribute:
                stack += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
                held += [attribute.t] if attribute.HasField("t") else []
        entries += [entry for tensor in held for entry in tensor.external_data if entry.key == "location"]
    return entries


def _check_written(file: Path, scratch: Path, *, load: bool) -> None:
    """Raise ExportError unless onnx's checker passes the file, or onnxruntime loads it; with `load` onnxruntime must load it all the same."""
    inferred = scratch / "inferred.onnx"
    try:
        onnx.checker.check_model(str(file))
        onnx.shape_inference.infer_shapes_path(str(file), str(inferred), strict_mode=True)
    except Exception as error:  # the checker's, the inference's, protobuf's, the file system's
        refusal = refused(file)
        if refusal is not None:
            raise ExportError(
                f"{file.name} could not be written as valid ONNX: {first_line(error)}. onnxruntime says: {refusal}."
            ) from error
    else:
        if load and (refusal := refused(file)) is not None:
            raise ExportError(f"{file.name} passes onnx's checker, and onnxruntime does not load it: {refusal}.")
    finally:
        inferred.unlink(missing_ok=True)
