"""The U-Net of a small diffusion model, of about 1 M parameters: it predicts the noise in images of 32 x 32 at given steps.

laurel-rewrite tools/examples/unet.py --variant rw+lr --rank 16

Skips from the way down to the way up are concatenated, and the time is added from outside: neither is a residual connection.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        y = self.norm(x).flatten(2).transpose(1, 2)
        y = self.attention(y, y, y, need_weights=False)[0]
        return x + y.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    def __init__(self, width: int = 32, channels: int = 3):
        super().__init__()
        self.width, time = width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down1, self.pool1 = Block(width, width, time), nn.Conv2d(width, 2 * width, 3, 2, padding=1)
        self.down2, self.pool2 = Block(2 * width, 2 * width, time), nn.Conv2d(2 * width, 4 * width, 3, 2, padding=1)
        self.middle1, self.attention, self.middle2 = (
            Block(4 * width, 4 * width, time),
            Attention(4 * width),
            Block(4 * width, 4 * width, time),
        )
        self.up2, self.join2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), Block(4 * width, 2 * width, time)
        self.up1, self.join1 = nn.ConvTranspose2d(2 * width, width, 2, 2), Block(2 * width, width, time)
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, images, steps):
        time = self.time(self.embedded(steps))
        first = self.down1(self.stem(images), time)
        second = self.down2(self.pool1(first), time)
        x = self.middle1(self.pool2(second), time)
        x = self.middle2(self.attention(x), time)
        x = self.join2(torch.cat([self.up2(x), second], 1), time)
        x = self.join1(torch.cat([self.up1(x), first], 1), time)
        return self.head(x)

    def embedded(self, steps):
        half = self.width // 2
        angles = steps[:, None] * torch.exp(torch.arange(half, device=steps.device) * (-math.log(10000.0) / half))
        return torch.cat([angles.sin(), angles.cos()], 1)


def build_model(**settings) -> UNet:
    return UNet(**settings)


def example_inputs():
    return (torch.randn(2, 3, 32, 32), torch.rand(2) * 1000)
