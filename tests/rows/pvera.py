"""Parity rows of PVeRA, in evaluation."""

from rows.row import GPT, LINEARS, Row

ROWS = [
    Row("PveraConfig", "mlp", {"target_modules": LINEARS, "r": 4, "d_initial": 0.2}),
    Row("PveraConfig", "mlp3d", {"target_modules": LINEARS, "r": 4, "save_projection": False, "projection_prng_key": 3}),
    Row("PveraConfig", "mlp", {"target_modules": LINEARS, "r": 4, "init_weights": False}),
    Row("PveraConfig", "gpt", {"target_modules": GPT, "r": 4, "bias": "pvera_only"}),
]
