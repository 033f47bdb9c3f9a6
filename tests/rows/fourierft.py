"""Parity rows of fourierft."""

from rows.row import GPT, LINEARS, Row

ROWS = [
    Row("FourierFTConfig", "mlp", {"target_modules": LINEARS, "n_frequency": 9, "scaling": 30.0}, single=True),
    Row("FourierFTConfig", "mlp",
        {"target_modules": LINEARS, "n_frequency": 9, "n_frequency_pattern": {"lin1": 5}, "random_loc_seed": 5}, single=True),
    Row("FourierFTConfig", "gpt", {"target_modules": GPT, "n_frequency": 9}, single=True),
]  # fmt: skip
