"""Parity rows of trainabletokens."""

from rows.row import Row

ROWS = [
    Row("TrainableTokensConfig", "embedding", {"target_modules": ["emb"], "token_indices": [3, 0, 7]}),
]  # fmt: skip
