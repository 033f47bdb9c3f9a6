"""Parity rows of GraLoRA."""

from rows.row import GPT, LINEARS, Row


def gralora(model, targets=LINEARS, **kwargs):
    return Row("GraloraConfig", model, {"target_modules": targets, "r": 4, "alpha": 6, **kwargs})


ROWS = [
    gralora("mlp"),
    gralora("mlp3d", gralora_k=4, r=8, bias="gralora_only"),
    gralora("mlp", gralora_k=1, hybrid_r=3),
    gralora("mlp", hybrid_r=2, init_weights=False),
    gralora("gpt", GPT, hybrid_r=1),
]
