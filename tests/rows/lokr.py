"""Parity rows of lokr."""

from rows.row import CONVS, LINEARS, Row

ROWS = [
    Row("LoKrConfig", "mlp", {"target_modules": LINEARS, "r": 2, "alpha": 5}, single=True),
    Row("LoKrConfig", "mlp", {"target_modules": LINEARS, "r": 1, "decompose_both": True, "decompose_factor": 4}, single=True),
    Row("LoKrConfig", "mlp", {"target_modules": LINEARS, "r": 2, "init_weights": "lycoris"}, single=True),
    Row("LoKrConfig", "conv2d", {"target_modules": CONVS, "r": 2, "use_effective_conv2d": True}, single=True),
    Row("LoKrConfig", "conv2d", {"target_modules": CONVS, "r": 8}, single=True),
]  # fmt: skip
