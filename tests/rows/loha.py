"""Parity rows of LoHa, which peft scales in float32."""

import torch
from torch import nn

from rows.row import CONVS, LINEARS, MODELS, Row


class Kernels(nn.Module):
    """Two convolutions of any geometry."""

    def __init__(self, first, second):
        super().__init__()
        self.conv0, self.conv1 = first, second

    def forward(self, x):
        return self.conv1(torch.tanh(self.conv0(x))).flatten(1)


def image(*shape):
    return lambda: torch.randn(2, *shape, dtype=torch.float64)


MODELS |= {
    "grouped2d": (
        lambda: Kernels(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 4, 1, groups=4)),
        image(4, 5, 5),
    ),
    "oblong2d": (
        lambda: Kernels(nn.Conv2d(4, 8, (1, 3), padding="same", dilation=(1, 2)), nn.Conv2d(8, 4, (3, 2), stride=(2, 1))),
        image(4, 7, 6),
    ),
    "grouped1d": (lambda: Kernels(nn.Conv1d(4, 8, 3, groups=2), nn.Conv1d(8, 6, 2, dilation=2)), image(4, 9)),
}


def loha(model, targets=CONVS, **kwargs):
    return Row("LoHaConfig", model, {"target_modules": targets, "r": 3, "alpha": 5, **kwargs}, single=True)


ROWS = [
    loha("mlp", LINEARS),
    loha("mlp3d", LINEARS, rank_dropout=0.2, module_dropout=0.1),
    loha("mlp", LINEARS, rank_pattern={"lin1": 2}, alpha_pattern={"lin0": 2}, init_weights=False),
    loha("conv1d"),
    loha("conv1d", use_effective_conv2d=True),
    loha("conv2d"),
    loha("conv2d", use_effective_conv2d=True),
    loha("conv2d", use_effective_conv2d=True, init_weights=False, rank_pattern={"conv0": 2}),
    loha("conv1x1", use_effective_conv2d=True),
    loha("grouped2d"),
    loha("grouped2d", use_effective_conv2d=True),
    loha("grouped1d"),
    loha("grouped1d", use_effective_conv2d=True),
    loha("oblong2d"),
    loha("oblong2d", use_effective_conv2d=True),
]
