"""Parity rows of PEANuT."""

from rows.row import LINEARS, Row


def peanut(model, targets=LINEARS, **kwargs):
    return Row("PeanutConfig", model, {"target_modules": targets, "r": 4, **kwargs})


ROWS = [
    peanut("mlp"),
    peanut("mlp3d", depth=2, act_fn="gelu", scaling=0.5),
    peanut("mlp", ["lin0", "lin2"], depth=1, act_fn="silu", init_weights=False),
    peanut("mlp", ".*lin[02]", depth=1, act_fn="tanh", exclude_modules=["lin2"]),
]
