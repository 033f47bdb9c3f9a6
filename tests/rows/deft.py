"""Parity rows of DEFT, which peft computes in float32."""

from rows.row import GPT, LINEARS, Row


def deft(model, targets=LINEARS, dtype="float64", **kwargs):
    # at the neutral start R comes of a product in float32 there and in the base's dtype here: the same bits if that is it
    drawn = "init_weights" in kwargs or "para" in kwargs or dtype == "float32"
    return Row("DeftConfig", model, {"target_modules": targets, "r": 4, **kwargs}, single=True, init=drawn, dtype=dtype)


ROWS = [
    deft("mlp"),
    deft("mlp", dtype="float32", alpha=3),
    deft("gpt", GPT, dtype="float32", decomposition_method="qr", bias="all"),
    deft("mlp3d", decomposition_method="qr", alpha=6, bias="deft_only"),
    deft("mlp", init_weights=False, init_scale=2.0, alpha=3),
    deft("mlp", para=True),
    deft("mlp", para=True, decomposition_method="qr", r=20),
    deft("mlp", r=20),
    deft("gpt", GPT, init_weights=False),
]
