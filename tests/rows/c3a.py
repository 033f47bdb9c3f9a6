"""Parity rows of C3A, which peft computes in float32."""

from rows.row import LINEARS, Row


def c3a(model, **kwargs):
    return Row("C3AConfig", model, {"target_modules": LINEARS, "block_size": 4, **kwargs}, single=True)


ROWS = [
    c3a("mlp"),
    c3a("mlp3d", block_size=2, bias="c3a_only"),
    c3a("mlp", init_weights=True),
    c3a("mlp", init_weights="gaussian", block_size_pattern={"lin1": 2}),
    c3a("mlp", init_weights="kaiming_uniform"),
]
