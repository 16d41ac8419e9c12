"""Files of any bytes, and models whose code does what it should not: a result, or an error of one line."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import EXAMPLES, run
from onnx import TensorProto, helper
from test_cli import NET
from test_graph_files import graph, with_data
from torch import nn
from toys import CASES, D

from laurel_rewrite import CaptureError, ConfigError, detect, load, profile, rewrite, save
from laurel_rewrite.files.manifest import MANIFEST
from laurel_rewrite.files.onnx import read_onnx
from laurel_rewrite.graph.feeds import check_feeds, draw_feeds, read_feeds
from laurel_rewrite.plan import LaurelConfig, Plan
from laurel_rewrite.sources.models import build, parse_settings
from tools.fuzz import formats

FORMER_FAULTS = {"axis 1 of two dimensions": 15437, "a stack trace that is a number": 27832}
"""Seeds of the fuzzer that once were faults, by what happened."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("saved")
    model = rewrite(CASES["loop"].make(), (torch.randn(CASES["loop"].shape),), variant="rw+lr+pa", rank=4)
    save(model, out)
    return out


def test_mutated_files_of_every_format():
    """A few hundred cases of those that `make fuzz` tries by the thousand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = [formats.run(seed) for seed in range(200)]
    assert set(kinds) == {*formats.KINDS, "pt2"}


@pytest.mark.parametrize("name", FORMER_FAULTS)
def test_mutated_files_that_were_faults(name):
    formats.run(FORMER_FAULTS[name])


# Plans


PLANS = {
    "no UTF-8": (lambda text: text.encode() + b"\xff", "no text in UTF-8"),
    "rank is a text": (lambda text: text.replace("rank = 4", 'rank = "4"'), "rank must be a whole number"),
    "dim is a list": (lambda text: re.sub(r"dim = \d+", "dim = [16]", text), "dim must be a whole number"),
    "id is a number": (lambda text: re.sub(r"id = .*", "id = 3", text, count=1), "id must be the owner's path"),
    "owner is true": (lambda text: re.sub(r"owner = .*", "owner = true", text), "owner must be a text"),
    "shape is a number": (lambda text: re.sub(r"shape = .*", "shape = 3", text), "shape must be a list"),
    "axis is 0": (lambda text: re.sub(r"axis = .*", "axis = 0", text), "axis must be one of -1, 1"),
    "axis 1 of two dimensions": (
        lambda text: re.sub(r"axis = .*", "axis = 1", re.sub(r"shape = .*", "shape = [2, 16]", text)),
        "3 to 5 dimensions",
    ),
    "stream is a date": (lambda text: re.sub(r"stream = .*", "stream = 2020-01-01", text), "stream must be a whole number"),
    "many turns": (lambda text: re.sub(r"turns = .*", "turns = 2000000000", text), "turns must be a whole number from 0 to 10000"),
    "turns that disagree": (lambda text: re.sub(r"turns = .*", "turns = 0", text), "disagree"),
    "seed is a text": (lambda text: text.replace("seed = 0", 'seed = "0"'), "seed must be a whole number"),
    "seed is huge": (lambda text: text.replace("seed = 0", "seed = " + "9" * 6000), "not valid TOML"),
    "sites are numbers": (lambda text: "version = 1\nsite = [1]\n", "site must be a list"),
    "deep": (lambda text: "a = " + "[" * 100_000, "not valid TOML"),
    "a key of many parts": (lambda text: "a." * 1_000_000 + "b = 1", "more than 100 parts"),
    "an unknown key at the top": (lambda text: "sede = 3\n" + text, "unknown key 'sede'. Nearest: seed"),
    "an id that is another attribute": (lambda text: text.replace("laurel_0", "forward"), "id must be the owner's path"),
    "an id of another owner": (lambda text: re.sub(r"owner = .*", 'owner = "other"', text), "does not begin with the owner"),
    "an escape sequence": (lambda text: re.sub(r"where = .*", 'where = "\\\\u001b[2J"', text), "where must be a text"),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name, folder, tmp_path):
    change, message = PLANS[name]
    made = change((folder / "plan.toml").read_text())
    path = tmp_path / "plan.toml"
    path.write_bytes(made if isinstance(made, bytes) else made.encode())
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Plan.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_plan_of_a_feature_size_that_no_memory_holds(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    plan = tmp_path / "plan.toml"
    plan.write_text(re.sub(r"dim = \d+", "dim = 2000000000", plan.read_text()))
    with pytest.raises(ConfigError, match="does not fit the plan"):
        load(tmp_path)


def test_seeds_are_whole_numbers_that_a_generator_takes():
    for seed in (-1, 2**63, True, "0"):
        with pytest.raises(ConfigError, match="seed must be a whole number"):
            LaurelConfig(seed=seed)


# Saved folders


CONFIGS = {
    "a list": (lambda c: [], "must be a table"),
    "model is a text": (lambda c: {**c, "model": "x"}, "model must be a dict"),
    "no kind": (lambda c: {**c, "model": {}}, "unknown kind of model: None"),
    "classes is a list": (lambda c: {**c, "classes": []}, "classes must be a table"),
    "a class is a number": (lambda c: {**c, "classes": {"": 1}}, "classes must be a table"),
    "a class of a module that is not there": (lambda c: {**c, "classes": {"nowhere": "Loop"}}, "names the module 'nowhere'"),
    "files is a number": (lambda c: {**c, "model": {**c["model"], "files": 1}}, "files must be a list"),
    "an unknown key": (lambda c: {**c, "sede": 1}, "unknown key 'sede'"),
    "a huge seed": (lambda c: {**c, "seed": 10**400}, "a number of 1329 bits"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, folder, tmp_path):
    change, message = CONFIGS[name]
    for file in folder.iterdir():
        if file.name != MANIFEST:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "laurel_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_weights_that_are_cut_short(cut, folder, tmp_path):
    for file in folder.iterdir():
        if file.name != MANIFEST:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=r"could not be read as safetensors|does not fit the plan"):
        load(tmp_path)


def test_weights_of_whole_numbers_in_the_place_of_floating_ones(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != MANIFEST:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ConfigError, match="is of type I32, and the model's of"):
        load(tmp_path)


# Graphs


def functions(count: int, calls: int = 1) -> onnx.ModelProto:
    """A graph with functions that call the next one so many times."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    made = []
    for n in range(count):
        names = ["x", *(f"h{k}" for k in range(calls - 1)), "y"]
        kind, domain = (f"F{n + 1}", "own") if n < count - 1 else ("Relu", "")
        body = [helper.make_node(kind, [a], [b], domain=domain) for a, b in itertools.pairwise(names)]
        made.append(helper.make_function("own", f"F{n}", ["x"], ["y"], body, opsets))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in "xy"]
    nodes = [helper.make_node("F0", ["x"], ["f"], domain="own"), helper.make_node("Add", ["x", "f"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:]), functions=made, opset_imports=opsets, ir_version=10)


def bytes_in_a_name() -> bytes:
    return graph().SerializeToString().replace(b"product", b"prod\xff\xfet")


def tensor_of(**fields) -> bytes:
    model = graph()
    for name, value in fields.items():
        setattr(model.graph.initializer[0], name, value)
    return model.SerializeToString()


def itself() -> bytes:
    model = functions(2)
    model.functions[1].node[0].op_type, model.functions[1].node[0].domain = "F0", "own"
    return model.SerializeToString()


GRAPHS = {
    "functions nested 5000 deep": (lambda: functions(5000).SerializeToString(), "more than 64 deep"),
    "functions that double 22 times": (lambda: functions(22, calls=2).SerializeToString(), "more than 1,000,000 nodes"),
    "a function that calls itself": (itself, "calls itself"),
    "bytes in a name": (bytes_in_a_name, "no text in UTF-8"),
    "a tensor of no type": (lambda: tensor_of(data_type=0), "unknown type 0"),
    "a tensor of a type that nobody knows": (lambda: tensor_of(data_type=99), "unknown type 99"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name, tmp_path):
    make, message = GRAPHS[name]
    (tmp_path / "model.onnx").write_bytes(make())
    with pytest.raises(CaptureError, match=message):
        detect(tmp_path / "model.onnx")


@pytest.mark.parametrize(("location", "length"), [("weights\0.bin", 1), ("", 1), ("weights.bin", -5), ("weights.bin", 10**30)])
def test_weights_of_a_graph_at_impossible_places(location, length, tmp_path):
    path = with_data(tmp_path, location, length)
    with pytest.raises(CaptureError, match="in another file"):
        read_onnx(path)


def test_functions_that_are_nested_are_read_in_a_process_of_their_own(tmp_path):
    (tmp_path / "model.onnx").write_bytes(functions(20).SerializeToString())
    assert len(detect(tmp_path / "model.onnx")) == 0


def test_a_profile_reads_files_as_everything_does(tmp_path):
    (tmp_path / "deep.onnx").write_bytes(functions(5000).SerializeToString())
    for name, message in (("deep.onnx", "deep"), ("z" * 300 + ".onnx", "cannot be read"), ("none.onnx", "There is no file")):
        with pytest.raises(ConfigError, match=message):
            profile([tmp_path / name], seconds=0)


def test_data_files_are_not_copied_into_the_place_of_a_result(tmp_path, here):
    (tmp_path / "model").mkdir()
    with_data(tmp_path / "model", "plan.toml")
    (tmp_path / "model" / "weights.bin").rename(tmp_path / "model" / "plan.toml")
    done = here("model/model.onnx", "--variant", "rw", "--profile-seconds", "0", "--target", "portable")
    assert done.returncode == 0, done.stderr
    assert Plan.read(tmp_path / "laurel_out" / "plan.toml").sites
    assert (tmp_path / "laurel_out" / "external" / "plan.toml").read_bytes() == (tmp_path / "model" / "plan.toml").read_bytes()


def test_inputs_of_sizes_that_cannot_be_drawn(tmp_path):
    model = graph()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40
    with pytest.raises(ConfigError, match="too large to be drawn"):
        draw_feeds(ir.from_proto(model))


def test_inputs_in_files(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"no array")
    with pytest.raises(ConfigError, match="hold 'x', which is no array"):
        read_feeds(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w", force_zip64=True) as member:
        for _ in range(5):
            member.write(bytes(1 << 20))
    with pytest.raises(ConfigError, match="hold 'x', which is no array"):
        read_feeds(path)
    monkeypatch.setattr("laurel_rewrite.graph.feeds.MOST_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match="bytes when unpacked"):
        read_feeds(path)
    np.savez(path, x=np.ones((2, 64), ">f4"))
    with pytest.raises(ConfigError, match="is of type float32"):
        check_feeds(ir.from_proto(graph()), read_feeds(path), "model")


# Exported programs


def program(folder: Path, change) -> Path:
    """A .pt2 file whose members went through `change(name, bytes)`."""
    buffer = io.BytesIO(formats._program())
    path = folder / "x.pt2"
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w") as made:
        for name in archive.namelist():
            made.writestr(name, change(name, archive.read(name)))
    return path


def test_exported_programs(tmp_path, capfd):
    assert len(detect(program(tmp_path, lambda name, data: data))) == 1
    path = program(tmp_path, lambda name, data: data[:100] if name.endswith("model.json") else data)
    with pytest.raises(CaptureError, match="could not be read as an exported program"):
        detect(path)
    called = tmp_path / "called"
    code = json.dumps(f"__import__('pathlib').Path({str(called)!r}).touch()")[1:-1].encode()
    for text in (code, b"9**9**9", b"().__class__"):
        path = program(tmp_path, lambda name, data, text=text: re.sub(rb'"expr_str": ?"[^"]*"', b'"expr_str": "' + text + b'"', data))
        with pytest.raises(CaptureError, match="is no size"):
            detect(path)
    assert not called.exists()
    path = program(tmp_path, lambda name, data: re.sub(rb'"stack_trace": ?"(?:\\.|[^"\\])*"', b'"stack_trace": 5', data))
    with pytest.raises(CaptureError, match=r"the metadata of the node .* is not what an export writes"):
        detect(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CaptureError, match="could not be read as an exported program"):
        detect(path)
    assert capfd.readouterr().err == ""


# The user's code


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "import sys; sys.exit(0)\n" + text, "could not be imported: SystemExit: 0"),
        (lambda text: text.replace("return Net()", "import sys; sys.exit(0)"), "build_model() raised SystemExit"),
        (lambda text: text.replace("return (torch.randn", "import sys; sys.exit(0); return (torch.randn"), "example_inputs() raised SystemExit"),
        (lambda text: text.replace("return x + self.l(x)", "import sys; sys.exit(0)"), ""),
    ],
)  # fmt: skip
def test_a_model_that_ends_the_program(change, message, tmp_path, here):
    name = f"ends_{len(message)}.py"
    (tmp_path / name).write_text(change(NET))
    done = here(name, "--rank", "4", "--profile-seconds", "0", "--quiet")
    assert done.returncode == 4
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "laurel_out").exists()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda text: text.replace("return x + self.l(x)", "raise BaseException('no')"), 4, "the model's code raised BaseException: no"),
        (lambda text: text.replace("return Net()", "raise GeneratorExit"), 4, "the model's code raised GeneratorExit"),
        (lambda text: text.replace("return x + self.l(x)", "raise KeyboardInterrupt"), 130, "Interrupted"),
        (lambda text: "import torch\ntorch.set_default_device('meta')\n" + text, 2, "is on the meta device: it has no values to verify"),
    ],
)
def test_what_no_model_should_raise(change, code, message, tmp_path, here):
    name = f"raises_{len(message)}.py"
    (tmp_path / name).write_text(change(NET))
    done = here(name, "--rank", "4", "--profile-seconds", "0")
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "laurel_out").exists()


@pytest.mark.parametrize("end", [".argmax(-1)", ".detach()", " > 0"])
def test_outputs_without_a_gradient_go_through_the_job(end, tmp_path, here):
    name = f"without_{len(end)}.py"
    (tmp_path / name).write_text(NET.replace("return x + self.l(x)", f"return (x + self.l(x)){end}"))
    done = here(name, "--rank", "4", "--profile-seconds", "0", "--json")
    assert done.returncode == 0, done.stderr
    (check,) = [check for check in json.loads(done.stdout)["verification"] if check["name"] == "gradients within two steps"]
    assert check["outcome"] == "not run"
    assert "no output carries a gradient" in check["detail"]


def test_inputs_that_are_none_in_python():
    x = torch.randn(2, 8)
    with pytest.raises(ConfigError, match="kwargs must be a dictionary of keyword arguments, not Tensor"):
        rewrite(nn.Linear(8, 8), (), x)
    with pytest.raises(ConfigError, match=r"rewrite takes a torch\.nn\.Module, not str"):
        rewrite("model.py", (x,))


def test_what_a_model_prints_does_not_stand_before_the_json(tmp_path):
    (tmp_path / "loud.py").write_text("print('hello')\n" + NET.replace("return Net()", "print('made'); return Net()"))
    done = run(tmp_path, "loud.py", "--rank", "4", "--dry-run", "--json")
    assert json.loads(done.stdout)["plan"]["sites"]
    assert "hello" in done.stderr and "made" in done.stderr


def test_what_a_model_sets_for_the_whole_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "setting.py").write_text("import os, torch\nos.chdir('elsewhere')\ntorch.set_default_device('meta')\n" + NET)
    built = build("setting.py")
    assert Path.cwd() == tmp_path
    assert torch.get_default_device().type == "cpu"
    assert {p.device.type for p in built.model.parameters()} == {"meta"}


def test_arguments_that_a_factory_does_not_take(here):
    for model, word, message in (
        (str(EXAMPLES / "gpt.py"), "dept=3", "Nearest: depth"),
        ("hf:gpt2", "n_layers=4", "Nearest: n_layer"),
        ("timm:vit_tiny_patch16_224", "dept=3", "Nearest: depth"),
        ("torchvision:resnet18", "num_class=3", "Nearest: num_classes"),
    ):
        done = here(model, "--set", word, "--dry-run")
        assert done.returncode == 2, (model, done.stderr)
        assert message in done.stderr, (model, done.stderr)
    for text in ("x={1, 2}", "x=1e999", "x=b'1'"):
        with pytest.raises(ConfigError, match="could not be saved"):
            parse_settings([text])


def test_weights_of_another_variant_name_the_plan_beside_them(tmp_path, here):
    from laurel_rewrite import export_onnx

    example = torch.randn(2, 5, D)
    base = CASES["plain"].make()
    save(rewrite(base, (example,), variant="lr", rank=4), tmp_path / "trained")
    export_onnx(base, (example,), None, tmp_path / "base.onnx")
    assert ir.load(tmp_path / "base.onnx").graph
    words = ("base.onnx", "--profile-seconds", "0", "--weights", "trained/model.safetensors")
    done = here(*words, "--variant", "rw")
    assert done.returncode == 2
    assert "--plan trained/plan.toml" in done.stderr
    assert here(*words, "--plan", "trained/plan.toml").returncode == 0


def test_a_line_of_thousands_of_digits(tmp_path, here):
    (tmp_path / "net.py").write_text(NET)
    done = here("sites", "net.py", "--explain", "net.py:" + "9" * 5000)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert sys.get_int_max_str_digits() > 0
