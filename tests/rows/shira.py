"""Parity rows of SHiRA; masks of one's own are in test_methods_shira.py."""

from rows.row import LINEARS, Row

ROWS = [
    Row("ShiraConfig", "mlp", {"target_modules": LINEARS, "r": 2}),
    Row("ShiraConfig", "mlp3d", {"target_modules": LINEARS, "r": 2, "random_seed": 11, "init_weights": False}),
    Row("ShiraConfig", "mlp", {"target_modules": ["lin0"], "r": 1, "modules_to_save": ["head"]}),
]
