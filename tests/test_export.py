"""ONNX in real onnxruntime against PyTorch, at shapes that were not captured, with LAuReL away from its start."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import away_from_start, output, real, slow
from toys import CASES, D

import laurel_rewrite.files.onnx
from laurel_rewrite import ConfigError, ExportError, export_onnx, rewrite
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.sources.models import build

RTOL, ATOL = 1e-4, 1e-5
VARIANTS = ["rw", "lr", "pa", "rw+lr", "rw+pa", "lr+pa", "rw+lr+pa"]


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})[0])


def laurel_nodes(path):
    return [node for node in ir.load(path).graph if node.domain == "laurel_rewrite"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [("loop", variant) for variant in VARIANTS]
    + [(name, "rw+lr+pa") for name in ("parallel_skip_middle", "tied", "images", "sequence_1d", "transformer_layer")]
    + [("parallel_skip_middle", "rw"), ("images", "lr"), ("tied", "pa")],
)
def test_toys_as_functions(name, variant, tmp_path):
    case = CASES[name]
    model = away_from_start(rewrite(case.make(), (torch.randn(case.shape),), variant=variant, rank=4))
    path = export_onnx(model, (torch.randn(case.shape),), None, tmp_path / "model.onnx", target="portable")
    other = torch.randn(case.shape[0] + 3, *case.shape[1:])
    torch.testing.assert_close(run(path, other), output(model, (other,)), rtol=RTOL, atol=ATOL)
    residual = [n for n in laurel_nodes(path) if not n.op_type.endswith("_branch")]
    assert len(residual) == case.sites


@pytest.mark.parametrize("options", [{"normalize": "sigmoid"}, {"normalize": "none"}, {"normalize": "paper"}, {"history_map": "identity"}])
def test_options_as_functions(options, tmp_path):
    x = torch.randn(2, 5, D)
    model = away_from_start(rewrite(CASES["loop"].make(), (x,), variant="rw+pa", rank=4, **options))
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx", target="portable")
    other = torch.randn(3, 8, D)
    torch.testing.assert_close(run(path, other), output(model, (other,)), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    ("name", "target"), [("gpt2", "ort-cpu"), slow("bert", "portable"), slow("cohere", "portable"), slow("t5", "ort-cpu")]
)
def test_real_architectures(name, target, tmp_path):
    example = real(name)
    model = away_from_start(rewrite(example.model, (), example.kwargs, variant="rw+lr+pa", rank=4), spread=0.1)
    path = export_onnx(model, (), example.kwargs, tmp_path / "model.onnx", target=target)
    with torch.no_grad():
        expected = output(model, (), {**example.other_kwargs, "use_cache": False})
    torch.testing.assert_close(run(path, *example.other_kwargs.values()), expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(("name", "variant"), [("resnet", "rw+lr+pa"), slow("gpt", "rw+lr")])
def test_the_examples_at_shapes_that_were_not_captured(name, variant, tmp_path):
    built = build(str(Path(__file__).parent.parent / "tools" / "examples" / f"{name}.py"))
    model = away_from_start(rewrite(built.model, built.args, variant=variant, rank=16), spread=0.1)
    path = export_onnx(model, built.args, None, tmp_path / "model.onnx")
    others = [torch.randint(0, 4096, shape) for shape in ((3, 31), (5, 100))] if name == "gpt" else [torch.randn(3, 3, 64, 64)]
    for other in others:
        torch.testing.assert_close(run(path, other), output(model, (other,)), rtol=RTOL, atol=ATOL)


def test_names_metadata_functions_and_dimensions(tmp_path):
    example = real("gpt2")
    model = rewrite(example.model, (), example.kwargs, variant="rw+lr", rank=4)
    path = export_onnx(model, (), example.kwargs, tmp_path / "model.onnx", target="portable")
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    nodes = laurel_nodes(path)
    ids = list(sites_of(model))
    assert [n.name for n in nodes] == ids
    assert [n.metadata_props["laurel_rewrite.site"] for n in nodes] == ids
    assert {n.metadata_props["laurel_rewrite.variant"] for n in nodes} == {"rw+lr"}
    assert {n.metadata_props["laurel_rewrite.rank"] for n in nodes} == {"4"}
    assert [f.domain for f in proto.functions] == ["laurel_rewrite"]
    assert all(n.domain == "" for f in proto.functions for n in f.node)
    names = {i.name for i in proto.graph.initializer}
    assert {f"{site}.{p}" for site in ids for p in ("mix", "down.weight", "up.weight")} <= names
    dims = [d.dim_param for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "sequence"]
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    assert inferred.graph.output[0].type.tensor_type.shape.dim[2].dim_value == 99


def test_the_baseline_has_the_same_interface(exported, tmp_path):
    example = real("bert")
    model = rewrite(example.model, (), example.kwargs, rank=4)
    graphs = [ir.load(path).graph for path in (exported("bert"), export_onnx(model, (), example.kwargs, tmp_path / "laurel.onnx"))]
    assert [(v.name, str(v.shape), v.dtype) for v in graphs[0].inputs] == [(v.name, str(v.shape), v.dtype) for v in graphs[1].inputs]
    assert [(str(v.shape), v.dtype) for v in graphs[0].outputs] == [(str(v.shape), v.dtype) for v in graphs[1].outputs]


def test_a_dimension_that_the_model_fixes_is_static(tmp_path):
    """Mamba loops over its sequence in Python: its length is part of the graph, its batch is not."""
    built = build("hf:mamba", {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 99})
    ids = built.kwargs["input_ids"][:, :5]
    model = away_from_start(rewrite(built.model, (), {"input_ids": ids}, rank=4))
    path = export_onnx(model, (), {"input_ids": ids}, tmp_path / "model.onnx")
    assert [str(d) for d in ir.load(path).graph.inputs[0].shape] == ["batch", "5"]
    other = torch.randint(0, 90, (3, 5))
    expected = output(model, (), {"input_ids": other, "use_cache": False})
    torch.testing.assert_close(run(path, other), expected, rtol=RTOL, atol=ATOL)


def test_target_none_writes_plain_ops(tmp_path):
    x = torch.randn(2, 5, D)
    model = away_from_start(rewrite(CASES["plain"].make(), (x,), rank=4))
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx", target="none")
    assert not laurel_nodes(path)
    other = torch.randn(4, 3, D)
    torch.testing.assert_close(run(path, other), output(model, (other,)), rtol=RTOL, atol=ATOL)


def test_a_batch_of_one_still_gives_a_dynamic_batch(tmp_path):
    x = torch.randn(1, 5, D)
    model = away_from_start(rewrite(CASES["plain"].make(), (torch.randn(2, 5, D),), rank=4))
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx")
    other = torch.randn(6, 4, D)
    torch.testing.assert_close(run(path, other), output(model, (other,)), rtol=RTOL, atol=ATOL)


def test_large_models_get_a_data_file(tmp_path, monkeypatch):
    monkeypatch.setattr(laurel_rewrite.files.onnx, "EXTERNAL_DATA_BYTES", 1000)
    x = torch.randn(2, 5, D)
    model = away_from_start(rewrite(CASES["plain"].make(), (x,), rank=4))
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    torch.testing.assert_close(run(path, x), output(model, (x,)), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_half_precision_models_are_valid(dtype, tmp_path):
    x = torch.randn(2, 5, D, dtype=dtype)
    model = away_from_start(rewrite(CASES["plain"].make().to(dtype), (x,), rank=4))
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx")
    # float16 has 11 bits, and the two sides round at other places in a chain of four layers.
    torch.testing.assert_close(run(path, x), output(model, (x,)), rtol=2e-2, atol=2e-2)


def test_the_model_is_left_as_it_was(tmp_path):
    x = torch.randn(2, 5, D)
    model = rewrite(CASES["loop"].make(), (x,), variant="pa", rank=4).train()
    export_onnx(model, (x,), None, tmp_path / "model.onnx")
    assert model.training
    assert all("forward" not in vars(m) and "branch" not in vars(m) for m in sites_of(model).values())
    assert all(slot.value is None for m in sites_of(model).values() if m.link is not None for slot in m.link.stream.slots)


class Unexportable(CASES["plain"].make().__class__):
    def forward(self, x):
        return x + self.f(x) if x.sum() > 0 else x


class Spectrum(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


def test_what_onnx_cannot_say_is_named(tmp_path):
    """Not how to report a bug to PyTorch, which stands around it."""
    with pytest.raises(ExportError, match=r"Spectrum could not be exported.*aten\.\w*svd") as caught:
        export_onnx(Spectrum(), (torch.randn(2, 5, 5),), None, tmp_path / "model.onnx")
    assert "submit a PR" not in str(caught.value)


def test_failures_write_nothing(tmp_path):
    x = torch.randn(2, 5, D)
    with pytest.raises(ExportError, match="Unexportable could not be exported"):
        export_onnx(Unexportable(), (x,), None, tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="Unknown target 'fast'"):
        export_onnx(CASES["plain"].make(), (x,), None, tmp_path / "model.onnx", target="fast")
    with torch.device("meta"):
        model = CASES["plain"].make()
    with pytest.raises(ExportError, match="meta device"):
        export_onnx(model, (x,), None, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="could not be written"):
        export_onnx(CASES["plain"].make(), (x,), None, tmp_path / "nowhere" / "model.onnx")
    assert not list(tmp_path.iterdir())


class OfTypes(torch.nn.Module):
    """A skip of one type beside branches of another."""

    def __init__(self, skip, branch, *, first):
        super().__init__()
        self.f, self.g = (torch.nn.Linear(D, D).to(branch) for _ in range(2))
        self.skip, self.branch, self.first = skip, branch, first

    def forward(self, x):
        for layer in (self.f, self.g):
            x = x.to(self.skip)
            f = layer(torch.relu(x).to(self.branch))
            x = x + f if self.first else f + x
        return x.float()


@pytest.mark.parametrize("target", ["ort-cpu", "portable", "none"])
@pytest.mark.parametrize(
    ("skip", "branch"), [(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.float64)]
)  # fmt: skip
def test_skip_and_branch_of_different_types(skip, branch, target, tmp_path):
    """The sum has the type that PyTorch gives it."""
    x = torch.randn(2, 5, D)
    model = away_from_start(rewrite(OfTypes(skip, branch, first=target != "none"), (x,), variant="rw+lr", rank=4)).eval()
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx", target=target)
    other = torch.randn(3, 4, D)
    half = torch.float16 in (skip, branch)  # 11 bits, rounded at other places
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if half else {"rtol": RTOL, "atol": ATOL}
    torch.testing.assert_close(run(path, other), output(model, (other,)), **tolerance)


class DoubleImages(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.f = torch.nn.Linear(D, D).to(dtype)

    def forward(self, x):
        x = x.double()
        for _ in range(2):
            f = self.f(torch.relu(x).to(self.f.weight.dtype).transpose(1, 3)).transpose(1, 3)
            x = x + f.double()
        return x.float()


@pytest.mark.parametrize("target", ["ort-cpu", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_over_channels_in_float64(dtype, target, tmp_path):
    """onnxruntime has no convolution of float64: U V x is two products there."""
    x = torch.randn(2, D, 3, D)
    model = away_from_start(rewrite(DoubleImages(dtype), (x,), variant="rw+lr+pa", rank=4)).eval()
    path = export_onnx(model, (x,), None, tmp_path / "model.onnx", target=target)
    other = torch.randn(3, D, 3, D)
    torch.testing.assert_close(run(path, other), output(model, (other,)), rtol=RTOL, atol=ATOL)
