"""Parity rows of DeLoRA."""

from rows.row import LINEARS, Row


def delora(model, **kwargs):
    return Row("DeloraConfig", model, {"target_modules": LINEARS, "r": 4, "delora_lambda": 3, **kwargs})


ROWS = [
    delora("mlp"),
    delora("mlp3d", bias="delora_only"),
    delora("mlp", init_weights=False, bias="all"),
    delora("mlp", rank_pattern={"lin1": 2}, lambda_pattern={"lin2": 5}),
]
