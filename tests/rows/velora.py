"""Parity rows of VeLoRA in evaluation; its backward is in test_methods_lora_variants.py."""

from peft import VeloraConfig

from rows.row import LINEARS, Row


def velora(model, **kwargs):
    given = {"target_modules": LINEARS, "r": 4, "lora_alpha": 6, **kwargs}
    return Row("LoraConfig", model, given, dtype="float32")  # a random direction is drawn in the base's dtype


ROWS = [
    velora("mlp", velora_config=VeloraConfig(num_groups=3)),
    velora("mlp3d", velora_config=VeloraConfig(num_groups=5, scale=0.5, init_type="random")),
    velora("mlp", velora_config=VeloraConfig(num_groups=4, init_type="batch_average_once"), init_lora_weights="gaussian"),
]
