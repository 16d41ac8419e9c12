"""Decoders as they are deployed: one graph for the prompt and for each token after it computes what `generate` does."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import LLAMA, close, slow
from onnx import TensorProto, helper
from torch import nn
from transformers import DynamicCache

from laurel_rewrite import (
    ConfigError,
    Connection,
    ExportError,
    VerificationError,
    detect,
    export_onnx,
    profile,
    register_operator,
    rewrite,
    rewrite_onnx,
    write_onnx,
)
from laurel_rewrite.graph.feeds import draw_feeds, phases
from laurel_rewrite.operators import registry
from laurel_rewrite.operators.connections import sites_of
from laurel_rewrite.plan.fits import plan_of
from laurel_rewrite.report import schema
from laurel_rewrite.sources.models import build
from laurel_rewrite.sources.past import Past
from laurel_rewrite.testing import moved
from laurel_rewrite.verification.onnx_runs import session_of

STEPS = 32
SMALL = LLAMA | {"num_hidden_layers": 2}
DECODERS = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2},
    "llama": SMALL,
    "mistral": SMALL | {"sliding_window": 8},
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "opt": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "vocab_size": 99,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"n_layer": 2, "hidden_size": 32, "n_head": 4, "vocab_size": 99},
    "falcon": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99},
    "gpt_neox": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 99},
    "phi": SMALL,
    "phi3": SMALL | {"pad_token_id": 0},
    "gemma": SMALL | {"head_dim": 8},
    "gemma2": SMALL | {"head_dim": 8, "sliding_window": 8},
    "gptj": {"n_layer": 2, "n_embd": 32, "n_head": 4, "rotary_dim": 4, "vocab_size": 99},
    "mpt": {"n_layers": 2, "d_model": 32, "n_heads": 4, "vocab_size": 99},
}
"""Windows of 8 slide over prompts of 6 and what comes after."""
POST_NORM = ("opt", {"do_layer_norm_before": False})
USUAL = {"rank": 4}


def decoder(name: str = "llama", **settings) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    built = build(f"hf:{name}", DECODERS[name] | settings)
    return built.model.eval(), built.kwargs


def rewritten(name: str, operator: str, spread: float = 0.1, **settings) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A decoder with an operator wherever it fits, off its start; None where it fits nowhere."""
    model, inputs = decoder(name, **settings)
    options = USUAL if "rank" in registry.operator(operator).options else {}
    plan, reason = plan_of(detect(model, (), inputs), operator, **options)
    assert plan is not None, reason
    return moved(rewrite(model, (), inputs, plan=plan, verify=False), spread).eval(), inputs


def empty(session) -> dict[str, np.ndarray]:
    """A past of no tokens, for a batch of 3."""
    shapes = {info.name: info.shape for info in session.get_inputs() if info.name.startswith("past_key_values.")}
    return {name: np.zeros((3, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}


def decoded(path: Path, model: nn.Module) -> None:
    """Logits in onnxruntime, step by step, are `generate`'s, of a batch with padding on the left."""
    prompt = torch.randint(3, 90, (3, 6))
    mask = torch.ones_like(prompt)
    mask[0, :2], mask[2, :3] = 0, 0
    with torch.no_grad():
        right = model.generate(
            prompt, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
    session = session_of(path)
    past, ids = empty(session), prompt
    takes = {info.name for info in session.get_inputs()}
    names = [info.name.replace("present.", "past_key_values.") for info in session.get_outputs()][1:]
    for step, expected in enumerate(right.logits):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **past}
        logits, *present = session.run(None, {name: array for name, array in feeds.items() if name in takes})
        close([logits[:, -1]], [expected.numpy()], rtol=0, atol=1e-4)
        past = dict(zip(names, present, strict=True))
        ids = right.sequences[:, 6 + step : 7 + step]
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)


@pytest.mark.parametrize(
    "operator",
    [name if name == "rw+lr+pa" else slow(name) for name in registry.operators() if name != "deepnorm"],
)
def test_every_operator_decodes(operator, tmp_path):
    model, inputs = rewritten("llama", operator)
    decoded(export_onnx(model, (), inputs, tmp_path / "model.onnx", past=True), model)


@pytest.mark.parametrize("name", [name if name == "gpt2" else slow(name) for name in DECODERS if name != "llama"])
def test_decoders_decode(name, tmp_path):
    model, inputs = rewritten(name, "rw+lr")
    decoded(export_onnx(model, (), inputs, tmp_path / "model.onnx", past=True), model)


@pytest.mark.slow
def test_a_post_norm_decoder_decodes(tmp_path):
    """With the one operator that is for such models alone."""
    model, inputs = rewritten(POST_NORM[0], "deepnorm", **POST_NORM[1])
    decoded(export_onnx(model, (), inputs, tmp_path / "model.onnx", past=True), model)


@pytest.mark.parametrize(
    ("target", "functions"), [("portable", "keep"), slow("portable", "inline"), slow("none", "keep"), slow("ort-cuda", "keep")]
)
def test_targets(target, functions, tmp_path):
    model, inputs = rewritten("gpt2", "rw+lr+pa")
    path = export_onnx(model, (), inputs, tmp_path / "model.onnx", past=True, target=target, functions=functions)
    sites = {node.metadata_props.get("laurel_rewrite.site") for node in ir.load(path).graph} - {None, ""}
    assert target == "none" or sites == set(sites_of(model))
    decoded(path, model)


def test_names_and_sizes(tmp_path):
    model, inputs = decoder(num_hidden_layers=1)
    before = dict(vars(model))
    graph = ir.load(export_onnx(model, (), inputs, tmp_path / "model.onnx", past=True)).graph
    assert dict(vars(model)) == before
    assert {value.name: str(value.shape) for value in graph.inputs} == {
        "input_ids": "[batch,sequence]", "attention_mask": "[batch,past + sequence]", "position_ids": "[batch,sequence]",
        "past_key_values.0.key": "[batch,2,past,8]", "past_key_values.0.value": "[batch,2,past,8]",
    }  # fmt: skip
    assert {value.name: str(value.shape) for value in graph.outputs} == {
        "logits": "[batch,sequence,99]",
        "present.0.key": "[batch,2,past + sequence,8]",
        "present.0.value": "[batch,2,past + sequence,8]",
    }


class Own(nn.Module):
    """A decoder of somebody's own, with the interface and another cache, or without the one or the other."""

    def __init__(self, returns=None) -> None:
        super().__init__()
        self.table, self.returns = nn.Embedding(9, 4), returns

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        return self.returns


class Plain(nn.Module):
    def forward(self, input_ids):
        return input_ids


IDS = torch.randint(3, 9, (2, 5))


@pytest.mark.parametrize(
    ("make", "inputs", "error", "message"),
    [
        (Plain, {"input_ids": IDS}, ExportError, "Plain cannot be exported with a past: its forward takes no attention_mask. past=True is for causal"),
        (Own, {"input_ids": IDS}, ExportError, "Own .* does not run with an empty DynamicCache .*returns logits and past_key_values"),
        (lambda: Own(type("Out", (), {"logits": 0, "past_key_values": DynamicCache()})), {"input_ids": IDS}, ExportError, "no keys and values"),
        (lambda: Own(), {"ids": IDS}, ConfigError, "Own does not take these inputs: .* exported from input_ids alone"),
        (lambda: decoder()[0], {"inputs_embeds": torch.randn(2, 5, 32)}, ConfigError, "from input_ids, whole numbers"),
        (lambda: decoder()[0], {"input_ids": IDS, "labels": IDS}, ConfigError, "there is no input 'labels' then. Leave it out"),
        (lambda: build("hf:t5", {"num_layers": 1, "d_model": 32, "d_ff": 64, "num_heads": 4, "d_kv": 8, "vocab_size": 99}).model, {"input_ids": IDS},
         ExportError, "an encoder and a decoder"),
        (lambda: build("hf:lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}).model, {"input_ids": IDS}, ExportError,
         "cannot be exported with a past"),
    ],
)  # fmt: skip
def test_what_has_no_past_is_refused(make, inputs, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(make(), (), inputs, tmp_path / "model.onnx", past=True)
    assert not any(tmp_path.iterdir())


def test_an_operator_over_time_is_refused(tmp_path):
    """What it computes of a token depends on the tokens that are computed with it; a past does not hold these."""

    @register_operator
    class Mean(Connection):
        name = "toy-mean"
        formula = "x + f + c*mean over the sequence of x"
        start = "exact"

        def build(self) -> None:
            self.c = nn.Parameter(torch.zeros(1))

        def step(self, x, f):
            return x + f + self.c * x.mean(1, keepdim=True)

    try:
        model, inputs = rewritten("llama", "toy-mean", 0.5)
        with pytest.raises(VerificationError, match="a past against the whole"):
            export_onnx(model, (), inputs, tmp_path / "model.onnx", past=True)
    finally:
        registry.forget(["toy-mean"])
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_half_precision(tmp_path):
    model, inputs = rewritten("llama", "rw+lr")
    export_onnx(model.half(), (), inputs, tmp_path / "model.onnx", past=True)
    kinds = {str(value.dtype) for value in ir.load(tmp_path / "model.onnx").graph.inputs if "past" in value.name}
    assert kinds == {"FLOAT16"}


def test_the_model_is_called_by_its_own_name_while_it_has_a_past():
    """A wrapper would give every site another id."""
    model, inputs = decoder()
    past = Past.of(model, (), inputs)
    ids = torch.randint(3, 90, (2, 4))
    with past.calling(model), torch.no_grad():
        logits, layers = model(**past.drawn(model, 2, 0, 4))
    assert logits.shape == (2, 4, 99)
    assert [layer["key"].shape for layer in layers] == [(2, 2, 4, 8)] * 2
    assert model(ids).logits.shape == (2, 4, 99)


# Profiled


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("graphs")
    model, inputs = decoder("gpt2", n_positions=64)
    files = [export_onnx(model, (), inputs, folder / "baseline.onnx", past=True)]
    return [*files, write_onnx(rewrite_onnx(files[0], variant="rw+lr", rank=4, target="ort-cpu"), folder / "laurel.onnx")]


def test_prefill_and_decoding_are_profiled_apart(graphs):
    result = profile(graphs, prompt=24, past=40, shapes={"batch": [2]}, seconds=0, min_rounds=2, threads=1)
    assert result.phases == ("prefill, 24 tokens", "decoding, 1 token behind 40")
    first, second = ({name: sizes[name] for name in ("input_ids", "attention_mask", "past_key_values.0.key")} for sizes in result.shapes)
    assert first == {"input_ids": "int64[2, 24]", "attention_mask": "int64[2, 24]", "past_key_values.0.key": "float32[2, 4, 0, 8]"}
    assert second == {"input_ids": "int64[2, 1]", "attention_mask": "int64[2, 41]", "past_key_values.0.key": "float32[2, 4, 40, 8]"}
    for row in result.rows:
        prefill, decoding = row.memories
        assert prefill.activation_bytes > decoding.activation_bytes > 0
        assert len(row.latencies) == len(row.residents) == 2
    (alone,) = profile(graphs[:1], past=40, seconds=0, min_rounds=2, threads=1).phases
    assert alone == "decoding, 1 token behind 40"


def test_the_command_profiles_them(graphs, here, tmp_path):
    result = here(
        "profile",
        *map(str, graphs),
        "--prompt",
        "8",
        "--past",
        "16",
        "--profile-seconds",
        "0.1",
        "--out",
        "out",
        "--fail-if",
        "latency_ms > 1e9",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    jsonschema.validate(report, schema())
    assert report["profile"]["phases"] == ["prefill, 8 tokens", "decoding, 1 token behind 16"]
    assert [len(row["memories"]) for row in report["profile"]["rows"]] == [2, 2, 2]
    for text in (result.stdout, (tmp_path / "out" / "report.html").read_text()):
        assert "decoding, 1 token behind 16" in text
        assert "more" in text  # inputs of later layers


def test_graphs_without_a_past_have_no_phases(exported, here):
    with pytest.raises(ConfigError, match=r"measured of decoders .* export_onnx\(..., past=True\) and --with-past write such"):
        profile([exported("gpt2")], prompt=8)
    with pytest.raises(ConfigError, match="The past is to be of 1 token or more, not 0"):
        profile([exported("gpt2")], past=0)
    assert "--prompt is for graphs with a past: give --with-past, too" in here("hf:gpt2", "--prompt", "8").stderr
    assert "--with-past is for models in PyTorch" in here(str(exported("gpt2")), "--with-past").stderr


@pytest.mark.parametrize(
    ("total", "past"), [("past_sequence_length + sequence_length", 5), ("total_sequence_length", 5), ("total_sequence_length", 0)]
)
def test_inputs_go_on_from_the_past(total, past):
    """As Optimum and onnxruntime-genai name the sizes."""
    inputs = {
        "input_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]), "attention_mask": (TensorProto.INT64, ["batch_size", total]),
        "position_ids": (TensorProto.INT64, ["batch_size", "sequence_length"]),
        "past_key_values.0.key": (TensorProto.FLOAT, ["batch_size", 2, "past_sequence_length", 4]),
    }  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_"]) for name in inputs], "graph",
        [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()],
        [helper.make_tensor_value_info(f"{name}_", of[0], None) for name, of in inputs.items()],
    )  # fmt: skip
    model = ir.from_proto(helper.make_model(graph))
    sizes = {"past_sequence_length": past, "sequence_length": 3}
    assert phases(model, 3, 5) == {
        "prefill, 3 tokens": {"sequence_length": 3, "past_sequence_length": 0},
        "decoding, 1 token behind 5": {"sequence_length": 1, "past_sequence_length": 5},
    }
    feeds = draw_feeds(model, sizes=sizes)
    assert feeds["attention_mask"].tolist() == [[1] * (past + 3)] * 2
    assert feeds["position_ids"].tolist() == [[past, past + 1, past + 2]] * 2
    assert feeds["past_key_values.0.key"].shape == (2, 2, past, 4)


def test_the_main_job_with_a_past(here, tmp_path):
    settings = [
        word for key, value in (DECODERS["gpt2"] | {"n_layer": 1, "n_positions": 32}).items() for word in ("--set", f"{key}={value}")
    ]
    result = here("hf:gpt2", *settings, "--rank", "4", "--with-past", "--prompt", "12", "--profile-seconds", "0.1")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "laurel_out" / "report.json").read_text())
    assert report["profile"]["phases"] == ["prefill, 12 tokens", "decoding, 1 token behind 31"]
    assert {"laurel.onnx, a past against the whole", "baseline.onnx, a past against the whole"} <= {
        one["name"] for one in report["verification"]
    }
    assert "past_key_values.0.key" in {value.name for value in ir.load(tmp_path / "laurel_out" / "laurel.onnx").graph.inputs}


def test_the_main_job_refuses_early(here, tmp_path):
    settings = (
        "--set",
        "num_hidden_layers=1",
        "--set",
        "hidden_size=32",
        "--set",
        "intermediate_size=64",
        "--set",
        "num_attention_heads=4",
    )
    result = here("hf:bert", *settings, "--with-past")
    assert result.returncode == 4
    assert "cannot be exported with a past" in result.stderr
    assert not any(tmp_path.iterdir())
