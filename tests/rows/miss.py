"""Parity rows of MiSS."""

from rows.row import LINEARS, Row


def miss(model, single=False, **kwargs):
    return Row("MissConfig", model, {"target_modules": LINEARS, "r": 4, **kwargs}, single=single)


ROWS = [
    miss("mlp"),
    miss("mlp3d", r=5, bias="MiSS_only"),
    miss("mlp", r=5, init_weights=False),
    miss("mlp", True, init_weights="bat"),
    miss("mlp3d", True, r=2, init_weights="bat", bias="all"),
    miss("mlp", mini_r=2, init_weights="mini"),
    miss("mlp3d", r=5, mini_r=8, init_weights="mini"),
]
