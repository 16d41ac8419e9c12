"""ONNX's Attention and RotaryEmbedding in PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, past_key: Tensor | None = None, past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None, *, is_causal: int = 0, q_num_heads: int = 0, kv_num_heads: int = 0, scale: float = 0.0,
    softcap: float = 0.0, softmax_precision: int = 0, left_window_size: int = -1, right_window_size: int = -1, outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """See the standard; operands are [B, heads, S, D] or [B, S, heads * D]. The products of queries and keys are no output here."""
    if outputs > 3:  # no exporter of PyTorch models asks for it
        raise NotImplementedError("Attention with its products as an output")
    packed = q.ndim == 3
    if packed:
        q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    present = (k, v)
    groups = q.shape[1] // k.shape[1]
    k, v = (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)) if groups > 1 else (k, v)
    scores = q @ k.transpose(2, 3) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    queries, keys = scores.shape[2:]
    at = torch.arange(keys, device=q.device)
    first = past if nonpad_kv_seqlen is None else (nonpad_kv_seqlen - queries).reshape(-1, 1, 1, 1)
    own = first + torch.arange(queries, device=q.device)[:, None]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    seen = seen & (at <= own) if is_causal else seen
    seen = seen & (at >= own - left_window_size) if left_window_size >= 0 else seen
    seen = seen & (at <= own + right_window_size) if right_window_size >= 0 else seen
    seen = seen if nonpad_kv_seqlen is None else seen & (at < nonpad_kv_seqlen.reshape(-1, 1, 1, 1))
    if attn_mask is not None:
        short = keys - attn_mask.shape[-1]  # the keys that a mask does not reach are not seen
        attn_mask = F.pad(attn_mask, (0, short), value=False if attn_mask.dtype == torch.bool else -math.inf)
        seen, scores = (seen & attn_mask, scores) if attn_mask.dtype == torch.bool else (seen, scores + attn_mask)
    scores = scores.masked_fill(~seen, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)  # the query of padding, whose result is 0
    result = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0) @ v
    result = result.transpose(1, 2).flatten(2) if packed else result
    return result if outputs == 1 else (result, *present)[:outputs]


def _heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def rotary_embedding(
    x: Tensor, cos_cache: Tensor, sin_cache: Tensor, position_ids: Tensor | None = None, *, interleaved: int = 0, num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:  # fmt: skip
    """See the standard; x is [B, heads, S, D] or [B, S, heads * D]."""
    packed = x.ndim == 3
    heads = x.reshape(*x.shape[:2], num_heads, -1) if packed else x.transpose(1, 2)
    cos, sin = ((cache if position_ids is None else cache[position_ids])[:, :, None] for cache in (cos_cache, sin_cache))
    turned, rest = heads[..., : 2 * cos.shape[-1]], heads[..., 2 * cos.shape[-1] :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    result = torch.cat((turned, rest), -1)
    return result.flatten(2) if packed else result.transpose(1, 2)
