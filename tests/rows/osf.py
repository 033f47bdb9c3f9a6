"""Parity rows of OSF, whose factors peft takes in float32."""

from rows.row import LINEARS, Row


def osf(model, dtype="float64", **kwargs):
    return Row("OSFConfig", model, {"target_modules": LINEARS, **kwargs}, single=True, dtype=dtype)


ROWS = [
    osf("mlp"),
    osf("mlp3d", effective_rank=3),
    osf("mlp", effective_rank=0.25),
    osf("mlp", "float32", rank_pattern={"lin1": 2, "lin[02]": 0.5}, init_weights=False),
]
