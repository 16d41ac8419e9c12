"""The feature axis, its size D, and which sites lie on one stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from toys import IMAGE, D, axes, conv, found

from laurel_rewrite import detect
from laurel_rewrite.detection.residuals import Residual
from laurel_rewrite.detection.streams import find_places
from laurel_rewrite.graph.dataflow import Dataflow, OpKind, Role


def test_channels_first_and_last():
    assert axes(found(lambda s, x: x + s.first(x), IMAGE, first=conv())) == [(1, D)]

    def last(s, x):
        y = s.stem(x).permute(0, 2, 3, 1)
        return y + s.a(F.gelu(s.norm(y)))

    assert axes(found(last, IMAGE, stem=conv())) == [(-1, D)]


def test_a_convolution_inside_a_channels_last_block():
    """ConvNeXt: the skip is NCHW, the branch goes through NHWC and back."""

    def body(s, x):
        y = s.depthwise(x).permute(0, 2, 3, 1)
        return x + s.b(F.gelu(s.a(s.norm(y)))).permute(0, 3, 1, 2)

    assert axes(found(body, IMAGE, depthwise=nn.Conv2d(D, D, 7, padding=3, groups=D))) == [(1, D)]


def test_sequence_first():
    """[S, B, D], as `nn.TransformerEncoderLayer` has it by default."""
    sites = detect(nn.TransformerEncoderLayer(D, 2, 32), (torch.randn(5, 2, D),))
    assert axes(sites) == [(-1, D)] * 2


def test_token_mixing_says_nothing_about_the_features():
    """MLP-Mixer: the linear layers of the token mixer act on the positions."""

    def body(s, x):
        x = x + s.out(F.gelu(s.tokens(s.norm(x).transpose(1, 2)))).transpose(1, 2)
        return x + s.b(F.gelu(s.a(s.norm(x))))

    sites = found(body, tokens=nn.Linear(5, 9), out=nn.Linear(9, 5))
    assert axes(sites) == [(-1, D)] * 2
    alone = found(
        lambda s, x: x + s.out(F.gelu(s.tokens(s.norm(x).transpose(1, 2)))).transpose(1, 2), tokens=nn.Linear(5, 9), out=nn.Linear(9, 5)
    )
    assert axes(alone) == [(-1, D)]


def test_windows_keep_the_stream():
    """Swin: [B, H, W, D], attention in windows, [B, H*W, D] for the MLP."""

    def body(s, x):
        y = s.stem(x).permute(0, 2, 3, 1)
        windows = s.norm(y).reshape(2, 2, 4, 2, 4, D).transpose(2, 3).reshape(8, 16, D)
        mixed = (windows @ windows.transpose(1, 2)).softmax(-1) @ s.a(windows)
        y = y + mixed.reshape(2, 2, 2, 4, 4, D).transpose(2, 3).reshape(2, 8, 8, D)
        tokens = y.reshape(2, 64, D)
        return tokens + s.b(F.gelu(s.norm(tokens)))

    sites = found(body, IMAGE, stem=conv())
    assert axes(sites) == [(-1, D)] * 2
    assert [(site.stream, site.index) for site in sites] == [(0, 0), (0, 1)]


def test_pooling_says_channels_first():
    assert axes(found(lambda s, x: x + F.avg_pool2d(x, 3, 1, 1), IMAGE)) == [(1, D)]
    assert axes(found(lambda s, x: x + F.max_pool2d(x, 3, 1, 1), IMAGE)) == [(1, D)]


def test_heads_are_no_features():
    """[B, heads, S, size] inside attention: nothing there mixes heads."""

    def body(s, x):
        q = x.reshape(2, 5, 4, 4).transpose(1, 2)
        q = q + (q @ q.transpose(2, 3)).softmax(-1) @ q
        return q.transpose(1, 2).reshape(2, 5, D)

    assert axes(found(body)) == [(-1, 4)]


def test_a_change_of_shape_begins_a_new_stream():
    def body(s, x):
        x = x + s.one(x)
        x = F.relu(x + s.two(x))
        x = s.down(x)
        x = x + s.three(x)
        return F.relu(s.norm2(x + s.four(x)))

    layers = {"one": conv(), "two": conv(), "down": conv(D, 32, 2), "three": conv(32), "four": conv(32), "norm2": nn.BatchNorm2d(32)}
    sites = found(body, IMAGE, **layers)
    assert [(site.stream, site.index, site.dim) for site in sites] == [(0, 0, D), (0, 1, D), (1, 0, 32), (1, 1, 32)]


def test_streams_of_one_expression_vote_together():
    flow = Dataflow()
    like = {"shape": (2, 5, D), "floating": True, "data": True}

    def site(x: int, reader: OpKind) -> Residual:
        branch = flow.add("f", "roll", OpKind(Role.MIXING), (x,), **like).index
        total = flow.add("z", "add", OpKind(Role.SUM), (x, branch), **like).index
        flow.add("r", "reader", reader, (total,), **like)
        return Residual(total, x, (branch,), ((total, 0),), "identity", x)

    residuals = [
        site(flow.add("x", "input", OpKind(Role.SOURCE), (), **like).index, OpKind(Role.MIXING, axis=axis, vote=vote))
        for axis, vote in ((-1, 4), (1, 1))
    ]
    assert [place.axis for place in find_places(flow, residuals)] == [-1, 1]
    assert [place.axis for place in find_places(flow, residuals, ["line", "line"])] == [-1, -1]
    assert [place.axis for place in find_places(flow, residuals, ["line", None])] == [-1, 1]
