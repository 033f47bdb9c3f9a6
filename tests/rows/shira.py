"""Parity rows of shira."""

from rows.row import LINEARS, Row

ROWS = [
    Row("ShiraConfig", "mlp", {"target_modules": LINEARS, "r": 2}),
    Row("ShiraConfig", "mlp3d", {"target_modules": LINEARS, "r": 2, "random_seed": 11, "init_weights": False}),
]  # fmt: skip
