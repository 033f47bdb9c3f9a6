"""Parity rows of lntuning."""

from rows.row import Row

ROWS = [
    Row("LNTuningConfig", "mlp", {"target_modules": ["norm"]}),
]  # fmt: skip
