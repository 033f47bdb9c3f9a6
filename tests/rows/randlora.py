"""Parity rows of RandLoRA."""

from rows.row import GPT, LINEARS, Row


def randlora(model, targets=LINEARS, **kwargs):
    return Row("RandLoraConfig", model, {"target_modules": targets, "r": 4, "randlora_alpha": 6, **kwargs})


ROWS = [
    randlora("mlp"),
    randlora("mlp3d", r=3, bias="randlora_only"),
    randlora("mlp", r=20, init_weights=False),
    randlora("mlp", save_projection=False, projection_prng_key=3),
    randlora("mlp", sparse=True),
    randlora("mlp", very_sparse=True, save_projection=False),
    randlora("gpt", GPT),
]
