"""Parity rows of HRA."""

from rows.row import LINEARS, Row

ROWS = [
    Row("HRAConfig", "mlp", {"target_modules": LINEARS, "r": 4}),
    Row("HRAConfig", "mlp3d", {"target_modules": LINEARS, "r": 2, "bias": "hra_only"}),
    Row("HRAConfig", "mlp", {"target_modules": LINEARS, "r": 4, "init_weights": False}),
    # peft starts orthogonalised vectors from equal pairs, which is degenerate: here they start apart
    Row("HRAConfig", "mlp", {"target_modules": LINEARS, "r": 4, "apply_GS": True}, init=False),
    Row("HRAConfig", "mlp", {"target_modules": LINEARS, "r": 4, "apply_GS": True, "init_weights": False}),
    Row("HRAConfig", "conv2d", {"target_modules": ["conv0", "conv1"], "r": 2}),
]
