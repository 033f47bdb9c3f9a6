"""Parity rows of vera."""

from rows.row import GPT, LINEARS, Row

ROWS = [
    Row("VeraConfig", "mlp", {"target_modules": LINEARS, "r": 4, "d_initial": 0.2}),
    Row("VeraConfig", "mlp3d", {"target_modules": LINEARS, "r": 4, "save_projection": False, "projection_prng_key": 3}),
    Row("VeraConfig", "gpt", {"target_modules": GPT, "r": 4, "bias": "vera_only"}),
]  # fmt: skip
