"""Parity rows of Lily; peft finds the group of a layer by string endings, see test_differences_lily_shadow_peanut.py."""

import torch
from torch import nn

from rows.row import LINEARS, MODELS, Row


class Tower(nn.Module):
    """Four blocks of the same layers, so that there is something to share."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(4))

    def forward(self, x):
        for b in self.blocks:
            x = x + b["down"](torch.tanh(b["up"](x)))
        return x


MODELS["tower"] = (Tower, lambda: torch.randn(2, 5, 6, dtype=torch.float64))


def lily(model, targets=LINEARS, **kwargs):
    return Row("LilyConfig", model, {"target_modules": targets, "r": 4, **kwargs}, merges=False)  # it has no merged form


ROWS = [
    lily("mlp", num_B=3, scaling=0.5),
    lily("tower", ["up", "down"], stride_A=2),
    lily("tower", ["down"], stride_A=3, num_B=3, init_weights=False),
    lily("tower", ".*(up|down)", stride_A=4),
    lily("tower", "all-linear"),
]
