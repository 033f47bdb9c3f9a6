"""Parity rows of FRoD; U is rounded to float32 in peft and here."""

from rows.row import GPT, LINEARS, Row


def frod(model, targets=LINEARS, dtype="float64", **kwargs):
    return Row(
        "FrodConfig", model, {"target_modules": targets, "sparse_rate": 0.1, "progressbar": False, **kwargs}, True, dtype=dtype
    )


ROWS = [
    frod("mlp"),
    frod("mlp3d", sparse_rate=0.02, bias="frod_only"),
    frod("mlp", save_projection=False, projection_prng_key=3),
    frod("mlp", dtype="float32", init_weights=False),
    frod("gpt", GPT),
]
