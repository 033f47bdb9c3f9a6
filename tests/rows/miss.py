"""Parity rows of miss."""

from rows.row import LINEARS, Row

ROWS = [
    Row("MissConfig", "mlp", {"target_modules": LINEARS, "r": 4}),
    Row("MissConfig", "mlp", {"target_modules": LINEARS, "r": 5, "init_weights": False}),
    Row("MissConfig", "mlp", {"target_modules": LINEARS, "r": 4, "init_weights": "bat"}, single=True),
    Row("MissConfig", "mlp", {"target_modules": LINEARS, "r": 4, "mini_r": 2, "init_weights": "mini"}),
]  # fmt: skip
