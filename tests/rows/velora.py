"""Parity rows of VeLoRA in evaluation; its backward is in test_methods_lora_variants.py."""

from peft import VeloraConfig

from rows.row import GPT, LINEARS, Row


def velora(model, dtype="float64", **kwargs):
    given = {"target_modules": LINEARS, "r": 4, "lora_alpha": 6, **kwargs}
    return Row("LoraConfig", model, given, dtype=dtype)


ROWS = [
    velora("mlp", velora_config=VeloraConfig(num_groups=3)),
    # peft draws a direction in the base's dtype
    velora("mlp3d", "float32", velora_config=VeloraConfig(num_groups=5, scale=0.5, init_type="random")),
    velora("mlp", velora_config=VeloraConfig(num_groups=4, init_type="batch_average_once"), init_lora_weights="gaussian"),
    velora("gpt", velora_config=VeloraConfig(num_groups=3), target_modules=GPT, use_rslora=True),
    velora("mlp", velora_config=VeloraConfig(), target_modules=["lin0"], lora_bias=True, alpha_pattern={"lin0": 3}),
]
