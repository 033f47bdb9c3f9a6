"""Parity rows of BEFT."""

from rows.row import LINEARS, Row

ROWS = [
    Row("BeftConfig", "mlp", {"target_modules": ["lin0", "lin2"]}),
    Row("BeftConfig", "mlp3d", {"target_modules": ["lin0", "lin2"], "init_weights": False}),
    Row("BeftConfig", "mlp", {"target_modules": LINEARS}, merges=False),  # "lin1" has no bias, and peft does not merge then
]
