"""Parity rows of GLoRA."""

from rows.row import LINEARS, Row


def glora(model, **kwargs):
    return Row("GloraConfig", model, {"target_modules": LINEARS, "r": 3, **kwargs})


ROWS = [
    glora("mlp"),
    glora("mlp3d", config_A_B="vector", config_C="vector", config_D_E="vector", bias="glora_only"),
    glora("mlp", config_A_B="constant", config_C="none", config_D_E="vector", init_weights=False),
    glora("mlp", config_A_B="none", config_C="lora", config_D_E="none", init_weights=False),
    glora("mlp", config_A_B="lora", config_C="vector", config_D_E="constant", init_weights=False),
]
