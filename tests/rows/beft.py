"""Parity rows of BEFT."""

from rows.row import Row

ROWS = [
    Row("BeftConfig", "mlp", {"target_modules": ["lin0", "lin2"]}),
    Row("BeftConfig", "mlp3d", {"target_modules": ["lin0", "lin2"], "init_weights": False}),
]
