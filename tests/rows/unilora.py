"""Parity rows of UniLoRA."""

from rows.row import GPT, LINEARS, Row


def unilora(model, targets=LINEARS, **kwargs):
    return Row("UniLoraConfig", model, {"target_modules": targets, "r": 2, "theta_d_length": 17, **kwargs})


ROWS = [
    unilora("mlp"),
    unilora("mlp3d", save_indices=True, bias="unilora_only"),
    unilora("mlp", init_weights=False, proj_seed=3),
    unilora("mlp", theta_d_length=400),
    unilora("gpt", GPT),
]
