"""A causal decoder with a past: how it is called with the keys and values of earlier tokens, and what its graph's inputs and outputs are called.

One graph serves the prompt, behind a past of no tokens, and each token after it. The names are those of Optimum and onnxruntime-genai:

    input_ids [batch, sequence], attention_mask [batch, past + sequence], position_ids [batch, sequence] where the model takes them,
    past_key_values.N.key, .value [batch, heads, past, head size]  ->  logits, present.N.key, .value [batch, heads, past + sequence, head size]
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laurel_rewrite.errors import ConfigError, ExportError
from laurel_rewrite.graph.capture import quiet, training

if TYPE_CHECKING:
    import onnx_ir as ir

_INPUTS = ("input_ids", "attention_mask", "position_ids")
_PARTS = ("key", "value")
_NEEDED = ("input_ids", "attention_mask", "past_key_values", "use_cache")
_OFFER = (
    "past=True is for causal decoders of transformers, and for modules with their interface: forward(input_ids, attention_mask, past_key_values, "
    "use_cache) fills a transformers Cache, and returns logits and past_key_values. Without past=True the model is exported as it is called."
)

Layers = Sequence[Mapping[str, Tensor]]
"""Keys and values of each layer, [batch, heads, tokens, head size]."""


@dataclass(frozen=True)
class Past:
    """How one decoder is called with a past.

    Attributes:
        name: of the model's class.
        ids: token ids that it knows, [N].
        positions: whether it takes position_ids.
        empty: the past of no tokens, for a batch of 1.
    """

    name: str
    ids: Tensor
    positions: bool
    empty: Layers

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Past:
        """How a model is called with a past, found out in one run of it.

        Args:
            model: a causal decoder; it is left as it was.
            args, kwargs: example inputs: `input_ids` and no others, but for an attention mask and positions, which are made anew.

        Raises:
            ConfigError: other inputs.
            ExportError: a model that has no keys and values to hand on, or hands on something else beside them.
        """
        name = type(model).__name__
        takes = inspect.signature(model.forward).parameters
        if absent := [one for one in _NEEDED if one not in takes]:
            raise ExportError(f"{name} cannot be exported with a past: its forward takes no {absent[0]}. {_OFFER}")
        if "decoder_input_ids" in takes:
            raise ExportError(f"{name} cannot be exported with a past: it is an encoder and a decoder, which are two graphs. {_OFFER}")
        try:
            bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        except TypeError as error:
            raise ConfigError(f"{name} does not take these inputs: {error}. With a past it is exported from input_ids alone.") from error
        given = {key: value for key, value in bound.items() if value is not None}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise ConfigError(f"{name} is exported with a past from input_ids, whole numbers of shape [batch, sequence]; there are none.")
        if more := [key for key in given if key not in _INPUTS]:
            raise ConfigError(f"{name} is exported with a past from input_ids alone; there is no input {more[0]!r} then. Leave it out.")
        layers = _handed_on(model, name, ids[:1, :1])
        empty = [{part: tensor[:, :, :0] for part, tensor in layer.items()} for layer in layers]
        return cls(name, ids.detach().flatten().long(), "position_ids" in takes, empty)

    @contextlib.contextmanager
    def calling(self, model: nn.Module) -> Iterator[None]:
        """For a while the model takes the inputs that `inputs` makes, and gives logits and the layers of past and sequence together.

        Its modules keep their paths, which a wrapper around it would not leave them.
        """
        from transformers import DynamicCache

        forward = model.forward

        def with_past(input_ids: Tensor, attention_mask: Tensor, past_key_values: Layers, position_ids: Tensor | None = None) -> Any:
            positions = {} if position_ids is None else {"position_ids": position_ids}
            # Without its configuration, a cache keeps what a sliding window leaves behind: the mask says what is seen, and all pasts are of one length.
            cache = DynamicCache([(layer["key"], layer["value"]) for layer in past_key_values])
            outputs = forward(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions)
            return outputs.logits, _layers(outputs.past_key_values)

        own = vars(model).get("forward")
        model.forward = with_past
        try:
            yield
        finally:
            if own is None:
                del model.forward
            else:
                model.forward = own

    # Inputs

    def inputs(self, ids: Tensor, mask: Tensor, past: Layers) -> dict[str, Any]:
        """Keyword arguments for ids [B, S] behind a past of P tokens, mask [B, P + S] with 0 where a token is padding on the left."""
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :].contiguous()} if self.positions else {}
        return {"input_ids": ids, "attention_mask": mask, **positions, "past_key_values": past}

    def drawn(self, model: nn.Module, batch: int, past: int, length: int, *, padding: int = 0, seed: int = 0) -> dict[str, Any]:
        """Inputs of random tokens, behind a past that the model itself computed of others.

        Args:
            batch, past, length: sizes.
            padding: of how many of the first tokens every second row has none.
        """
        generator = torch.Generator().manual_seed(seed)
        ids = self.ids[torch.randint(len(self.ids), (batch, past + length), generator=generator).to(self.ids.device)]
        mask = torch.ones_like(ids)
        mask[::2, :padding] = 0
        layers: Layers = [{part: tensor.repeat(batch, 1, 1, 1) for part, tensor in layer.items()} for layer in self.empty]
        if past:
            with self.calling(model), training(model, False), quiet(), torch.no_grad():
                _, layers = model(**self.inputs(ids[:, :past].contiguous(), mask[:, :past].contiguous(), layers))
        return self.inputs(ids[:, past:].contiguous(), mask, layers)

    def draws(self, model: nn.Module, seed: int) -> list[dict[str, Any]]:
        """Inputs of every kind: a prompt behind nothing, one token behind a past, several behind one that begins with padding.

        None of the tokens is padding itself: what is computed of that is read by nobody, and differs from kernel to kernel.
        """
        sizes = ((3, 0, 6, 0), (1, 5, 1, 0), (2, 7, 4, 3))
        return [
            self.drawn(model, batch, past, length, padding=padding, seed=seed + number)
            for number, (batch, past, length, padding) in enumerate(sizes)
        ]

    def whole(self, model: nn.Module, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same tokens twice: as one prompt that begins with padding, and the last of them behind a past of the others."""
        behind, prompt = (self.drawn(model, 2, past, 8 - past, padding=2, seed=seed) for past in (7, 0))
        return prompt, behind

    def tensors(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Inputs by their names in the graph, in its order."""
        named = {key: inputs[key] for key in _INPUTS if key in inputs}
        return named | {f"past_key_values.{n}.{part}": layer[part] for n, layer in enumerate(inputs["past_key_values"]) for part in _PARTS}

    # The graph

    def dynamic_shapes(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """For an export with `inputs`."""
        auto = torch.export.Dim.AUTO
        layer = {part: {0: auto, 2: auto} for part in _PARTS}
        return {key: [layer for _ in self.empty] if key == "past_key_values" else {0: auto, 1: auto} for key in inputs}

    def symbols(self, graph: ir.Graph) -> dict[str, str]:
        """The names of the sizes in an exported graph, by the symbols that stand for them.

        Raises:
            ExportError: one of them turned out to be fixed.
        """
        names: dict[str, str] = {}
        for place, value in enumerate(graph.inputs):
            open_sizes = self._shape(place)
            for name, dim in zip(open_sizes, value.shape or (), strict=True):
                if isinstance(name, int):
                    continue
                if isinstance(dim, int):
                    raise ExportError(f"{self.name} cannot be exported with a past: it fixes the size {name!r} of {value.name} at {dim}.")
                names[str(dim.value)] = "total" if " " in name else name
        return names

    def name_values(self, graph: ir.Graph) -> None:
        """Give inputs and outputs of an exported graph their names and sizes."""
        import onnx_ir as ir

        layers = [f"{n}.{part}" for n in range(len(self.empty)) for part in _PARTS]
        inputs = [*_INPUTS[: 2 + self.positions], *(f"past_key_values.{layer}" for layer in layers)]
        for place, (value, name) in enumerate(zip(graph.inputs, inputs, strict=True)):
            value.name, value.shape = name, ir.Shape(self._shape(place))
        for place, (value, name) in enumerate(zip(graph.outputs, ["logits", *(f"present.{layer}" for layer in layers)], strict=True)):
            value.name = name
            if place:
                shape = self._shape(place + 1 + self.positions)
                value.shape = ir.Shape([shape[0], shape[1], _TOTAL, shape[3]])

    def _shape(self, place: int) -> list[int | str]:
        """Sizes of an input by its place in the graph."""
        layer = place - 2 - self.positions
        if layer < 0:
            return ["batch", _TOTAL if place == 1 else "sequence"]
        tensor = self.empty[layer // 2][_PARTS[layer % 2]]
        return ["batch", tensor.shape[1], "past", tensor.shape[3]]


_TOTAL = "past + sequence"


def _layers(cache: Any) -> list[dict[str, Tensor]]:
    return [{"key": layer.keys, "value": layer.values} for layer in cache.layers]


def _handed_on(model: nn.Module, name: str, ids: Tensor) -> list[dict[str, Tensor]]:
    """The layers that a model hands on behind one token; ExportError where these are none, or not all."""
    try:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer
    except ImportError as error:
        raise ExportError(f"{name} cannot be exported with a past: transformers, whose Cache it would fill, is not installed.") from error
    try:
        with training(model, False), quiet(), torch.no_grad():
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=DynamicCache(), use_cache=True)
        cache, _ = outputs.past_key_values, outputs.logits
        layers = _layers(cache)
    except Exception as error:  # whatever a foreign model raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ExportError(
            f"{name} cannot be exported with a past: it does not run with an empty DynamicCache ({reason}). {_OFFER}"
        ) from error
    other = [type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer]
    whole = all(isinstance(one, Tensor) and one.ndim == 4 and one.shape[2] == 1 for layer in layers for one in layer.values())
    if other or not layers or not whole:
        what = f"a {other[0]}" if other else "no keys and values [batch, heads, tokens, head size]"
        raise ExportError(f"{name} cannot be exported with a past: what it hands on to the next token has {what} in a layer. {_OFFER}")
    return layers
