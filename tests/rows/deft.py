"""Parity rows of DEFT, which peft computes in float32."""

from rows.row import GPT, LINEARS, Row


def deft(model, targets=LINEARS, **kwargs):
    # at the neutral start R comes of a product in float32, here in the base's dtype: equal, but not bit for bit
    drawn = "init_weights" in kwargs or "para" in kwargs
    return Row("DeftConfig", model, {"target_modules": targets, "r": 4, **kwargs}, single=True, init=drawn)


ROWS = [
    deft("mlp"),
    deft("mlp3d", decomposition_method="qr", alpha=6, bias="deft_only"),
    deft("mlp", init_weights=False, init_scale=2.0, alpha=3),
    deft("mlp", para=True),
    deft("mlp", para=True, decomposition_method="qr", r=20),
    deft("gpt", GPT, init_weights=False),
]
