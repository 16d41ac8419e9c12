"""An encoder and a decoder, as for translation, of about 4 M parameters: two streams, and an attention of the one to the other.

laurel-rewrite tools/examples/translator.py --variant rw+lr --rank 16
"""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, memory, causal: bool = False):
        q, k, v = (self.split(t) for t in (self.query(x), self.key(memory), self.value(memory)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.cross = nn.LayerNorm(width), Attention(width, heads)
        self.norm3, self.mlp = nn.LayerNorm(width), mlp(width)

    def forward(self, x, memory):
        y = self.norm1(x)
        x = x + self.attention(y, y, causal=True)
        x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class Translator(nn.Module):
    def __init__(self, vocabulary: int = 2048, context: int = 128, width: int = 192, depth: int = 3, heads: int = 3):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.encoder = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.encoded = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, source, target):
        memory = self.embedded(source)
        for block in self.encoder:
            memory = block(memory)
        memory = self.encoded(memory)
        x = self.embedded(target)
        for block in self.decoder:
            x = block(x, memory)
        return self.head(self.norm(x))

    def embedded(self, ids):
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))


def build_model(**settings) -> Translator:
    return Translator(**settings)


def example_inputs():
    return (torch.randint(0, 256, (2, 24)), torch.randint(0, 256, (2, 16)))
