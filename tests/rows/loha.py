"""Parity rows of loha."""

from rows.row import CONVS, LINEARS, Row

ROWS = [
    Row("LoHaConfig", "mlp", {"target_modules": LINEARS, "r": 3, "alpha": 5}, single=True),
    Row("LoHaConfig", "conv2d", {"target_modules": CONVS, "r": 3, "alpha": 5}, single=True),
    Row("LoHaConfig", "conv2d", {"target_modules": CONVS, "r": 3, "alpha": 4, "use_effective_conv2d": True}, single=True),
    Row("LoHaConfig", "mlp",
        {"target_modules": LINEARS, "r": 3, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 2},
         "init_weights": False}, single=True),
]  # fmt: skip
