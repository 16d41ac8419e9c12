"""x' = b x + a f with weights on skip and branch: numbers, learned or not, or one a feature. All of it folds into the weights around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laurel_rewrite.operators.config import BranchMap, Option, SiteConfig
from laurel_rewrite.operators.families.laurel import weights
from laurel_rewrite.operators.protocol import Connection
from laurel_rewrite.operators.registry import register_operator
from laurel_rewrite.operators.sums import scaled


@register_operator
class VectorResidualWeights(Connection):
    """LAuReL's RW with one weight a feature; `mix` is [2, D] ([1, D] for sigmoid), bounded as LAuReL's."""

    name = "rw-vector"
    title = "VectorRW"
    formula = "a*f + b*x, a and b in R^D"
    paper = "LAuReL: Learned Augmented Residual Layer, ICML 2025"
    needs = frozenset({"features"})
    normalize = Option("softmax", "Bound on a and b", choices=("softmax", "sigmoid", "none", "paper"))

    def build(self) -> None:
        self.mix = nn.Parameter(torch.zeros(1 if self.config.normalize == "sigmoid" else 2, self.config.dim))

    def skip(self, x: Tensor) -> Tensor:
        return self.per_feature(weights(self.mix, self.config.normalize)[1].flatten()).to(x.dtype) * x

    def branch(self, f: Tensor) -> Tensor:
        return self.per_feature(weights(self.mix, self.config.normalize)[0].flatten()).to(f.dtype) * f

    @classmethod
    def start_of(cls, config: SiteConfig) -> str:
        """With normalize=paper a and b start at 1/2."""
        return "inexact" if config.normalize == "paper" else "exact"


class _BranchWeight(Connection):
    """x + a f with one learned number."""

    def build(self) -> None:
        self.a = nn.Parameter(torch.full((1,), self.started_at()))

    def started_at(self) -> float:
        """Where a starts."""
        return 0.0

    def skip(self, x: Tensor) -> Tensor:
        return x

    def branch(self, f: Tensor) -> Tensor:
        return scaled(f, self.a)


@register_operator
class ReZero(_BranchWeight):
    """The branch starts at nothing."""

    name = "rezero"
    formula = "x + a*f, a = 0 at first"
    paper = "ReZero is All You Need: Fast Convergence at Large Depth, UAI 2021"
    start = "inexact"


@register_operator
class SkipInit(_BranchWeight):
    """The same, as it was found for residual networks without normalisation."""

    name = "skipinit"
    title = "SkipInit"
    formula = "x + a*f, a = 0 at first"
    paper = "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks, NeurIPS 2020"
    start = "inexact"
    init = Option(0.0, "Start of a")

    def started_at(self) -> float:
        return float(self.config.init)


@register_operator
class LayerScale(Connection):
    """One small weight a feature on the branch."""

    name = "layerscale"
    title = "LayerScale"
    formula = "x + g*f, g in R^D = 1e-5 at first"
    paper = "Going deeper with Image Transformers, ICCV 2021"
    start = "inexact"
    needs = frozenset({"features"})
    init = Option(1e-5, "Start of g")

    def build(self) -> None:
        self.g = nn.Parameter(torch.full((self.config.dim,), float(self.config.init)))

    def skip(self, x: Tensor) -> Tensor:
        return x

    def branch(self, f: Tensor) -> Tensor:
        return self.per_feature(self.g).to(f.dtype) * f


@register_operator
class DeepNorm(Connection):
    """A larger skip in front of the norm that follows, and smaller weights in the branch.

    A stream of N layers of two sums each has a = (2N)^(1/4), and weights divided by (8N)^(1/4), those of queries and keys excepted; of a
    decoder of M layers of three sums each it is (3M)^(1/4) and (12M)^(1/4): both are L^(1/4) and (4L)^(1/4) with L the sums of the stream.
    An encoder in front of a decoder has other factors in the paper, which depend on the decoder; it gets those of an encoder alone. Queries,
    keys and values that one map makes are left as they are.
    """

    name = "deepnorm"
    title = "DeepNorm"
    formula = "a*x + f in front of a norm, a = L^(1/4), weights of f times (4L)^(-1/4)"
    paper = "DeepNet: Scaling Transformers to 1,000 Layers, 2022"
    start = "inexact"
    needs = frozenset({"whole stream", "norms between"})

    def skip(self, x: Tensor) -> Tensor:
        return x * float(max(self.config.length, 1) ** 0.25)

    def branch(self, f: Tensor) -> Tensor:
        return f

    @classmethod
    def prepare_branch(cls, config: SiteConfig, place: BranchMap) -> float:
        return 1.0 if {"q", "k"} & {*place.projection} else (4.0 * max(config.length, 1)) ** -0.25


@register_operator
class Fixup(_BranchWeight):
    """The scale of Fixup, and its start: the branch's last weight is 0, the m - 1 before it are times L^(-1/(2m-2)). Its biases inside the
    branch are not added."""

    name = "fixup"
    formula = "x + s*f, the last weight of f 0 at first, the others times L^(-1/(2m-2))"
    paper = "Fixup Initialization: Residual Learning Without Normalization, ICLR 2019"
    start = "inexact"

    def started_at(self) -> float:
        return 1.0

    @classmethod
    def prepare_branch(cls, config: SiteConfig, place: BranchMap) -> float:
        if place.last:
            return 0.0
        return float(max(config.length, 1) ** (-1 / (2 * max(place.count, 2) - 2)))


@register_operator
class Contractive(Connection):
    """One step of a damped fixed-point iteration. The paper shares the block's weights over its steps, which is the model's to do."""

    name = "contractive"
    formula = "(1 - dt)*x + dt*f"
    paper = "SCORE, arXiv 2603.10544"
    start = "inexact"
    dt = Option(0.5, "Size of the step, its start where it is learned", minimum=0.0, maximum=1.0)
    step_size = Option("constant", "Whether dt is learned, one number a site", choices=("constant", "learned"))

    def build(self) -> None:
        self.learned_dt = nn.Parameter(torch.full((1,), float(self.config.dt))) if self.config.step_size == "learned" else None

    def skip(self, x: Tensor) -> Tensor:
        return scaled(x, 1 - self.learned_dt) if self.learned_dt is not None else (1 - float(self.config.dt)) * x

    def branch(self, f: Tensor) -> Tensor:
        return scaled(f, self.learned_dt) if self.learned_dt is not None else float(self.config.dt) * f
