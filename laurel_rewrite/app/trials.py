"""Small things that are really done, to see what works on a machine."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import laurel_rewrite
from laurel_rewrite.errors import reason
from laurel_rewrite.testing import moved

_RTOL, _ATOL = 1e-4, 1e-5


class Small(nn.Module):
    """A residual connection, which is all that must be found."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def small(*, verify: bool = False) -> tuple[nn.Module, Tensor]:
    """The model rewritten, with its connection away from the start, and its input."""
    torch.manual_seed(0)
    model, x = Small(), torch.randn(2, 4, 16)
    better = laurel_rewrite.rewrite(model, (x,), variant="rw+lr", rank=2, verify=verify)
    return moved(better, 0.1).eval(), x


def rewritten() -> str:
    """Capture, rewrite and verify."""
    model, _ = small(verify=True)
    return f"{len(laurel_rewrite.learned(model))} connection found, replaced and verified"


def exported() -> str:
    """ONNX, and its numbers in onnxruntime."""
    import onnxruntime

    model, x = small()
    with tempfile.TemporaryDirectory(prefix="laurel-doctor-") as folder:
        path = laurel_rewrite.export_onnx(model, (x,), None, Path(folder) / "small.onnx", verify=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=_RTOL, atol=_ATOL)
    return "onnxruntime computes what PyTorch does"


def compiled() -> str:
    """torch.compile, and its numbers. Without vectors and precompiled headers, which a compiler takes long for and a small model needs not."""
    model, x = small()
    with torch.no_grad():
        fast = torch.compile(model, options={"cpp.simdlen": 0, "cpp_cache_precompile_headers": False})
        torch.testing.assert_close(fast(x), model(x), rtol=_RTOL, atol=_ATOL)
    return "the compiled model computes what the model does"


if __name__ == "__main__":  # `compiled` in a process of its own, which can be given up
    try:
        print(compiled())
    except Exception as error:
        print(reason(error))
        sys.exit(1)
