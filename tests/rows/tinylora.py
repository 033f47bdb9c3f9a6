"""Parity rows of TinyLoRA; peft takes the singular vectors in float32."""

from rows.row import GPT, LINEARS, Row


def tinylora(model, targets=LINEARS, **kwargs):
    return Row("TinyLoraConfig", model, {"target_modules": targets, "r": 2, "u": 3, **kwargs})


ROWS = [
    tinylora("mlp"),
    tinylora("mlp3d", weight_tying=1.0, bias="tinylora_only"),
    tinylora("mlp", weight_tying=0.5, r=20),
    tinylora("mlp", save_projection=False, projection_seed=3),
    tinylora("mlp", init_weights="uniform", weight_tying=0.3),
    tinylora("gpt", GPT),
    tinylora("embedding", ["emb", "lin0"], tinylora_dropout=0.5),
]
