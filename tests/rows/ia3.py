"""Parity rows of ia3."""

from rows.row import CONVS, GPT, LINEARS, Row

ROWS = [
    Row("IA3Config", "mlp", {"target_modules": LINEARS, "feedforward_modules": ["lin1"]}),
    Row("IA3Config", "mlp", {"target_modules": LINEARS, "feedforward_modules": [], "init_ia3_weights": False}),
    Row("IA3Config", "gpt", {"target_modules": GPT, "feedforward_modules": ["c_proj"]}),
    Row("IA3Config", "conv2d", {"target_modules": CONVS, "feedforward_modules": ["conv1"]}),
    Row("IA3Config", "conv3d", {"target_modules": CONVS, "feedforward_modules": ["conv0"]}),
]  # fmt: skip
