"""What a parity row is, and the small models that rows adapt."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.lin1 = nn.Linear(16, 8, bias=False)
        self.lin2 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(torch.tanh(self.lin0(x)))
        return self.head(torch.tanh(self.lin2(self.lin1(x))))


class Convs(nn.Module):
    def __init__(self, dims=2, kernel=3):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv0 = conv(4, 8, kernel, stride=2, padding=1)
        self.conv1 = conv(8, 4, 1)

    def forward(self, x):
        return self.conv1(torch.tanh(self.conv0(x))).flatten(1)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.lin0 = nn.Linear(8, 6)

    def forward(self, ids):
        return self.lin0(self.emb(ids))


class Gpt(nn.Module):
    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_attn = Conv1D(24, 8)
        self.c_proj = Conv1D(8, 24)

    def forward(self, x):
        return self.c_proj(torch.tanh(self.c_attn(x)))


MODELS = {
    "mlp": (Mlp, lambda: torch.randn(5, 12, dtype=torch.float64)),
    "mlp3d": (Mlp, lambda: torch.randn(2, 5, 12, dtype=torch.float64)),
    "conv1d": (lambda: Convs(1), lambda: torch.randn(2, 4, 9, dtype=torch.float64)),
    "conv2d": (Convs, lambda: torch.randn(2, 4, 9, 9, dtype=torch.float64)),
    "conv3d": (lambda: Convs(3), lambda: torch.randn(2, 4, 5, 5, 5, dtype=torch.float64)),
    "conv1x1": (lambda: Convs(2, 1), lambda: torch.randn(2, 4, 5, 5, dtype=torch.float64)),
    "embedding": (Embedded, lambda: torch.arange(20).reshape(4, 5)),
    "gpt": (Gpt, lambda: torch.randn(2, 3, 8, dtype=torch.float64)),
}


@dataclasses.dataclass(frozen=True)
class Row:
    config: str
    model: str
    kwargs: dict
    single: bool = False
    merges: bool = True
    init: bool = True
    values: dict = dataclasses.field(default_factory=dict)  # of the call: keywords in peft, values of the context here
    dtype: str = "float64"

    def __str__(self):
        return f"{self.config}-{self.model}-{'-'.join(f'{k}={v}' for k, v in self.kwargs.items() if k != 'target_modules')}"


LINEARS = ["lin0", "lin1", "lin2"]
CONVS = ["conv0", "conv1"]
GPT = ["c_attn", "c_proj"]
