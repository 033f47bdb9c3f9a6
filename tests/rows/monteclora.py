"""Parity rows of MonteCLoRA in evaluation, where it is LoRA; the start consumes peft's pool of noise too."""

from peft import MontecloraConfig

from rows.row import GPT, LINEARS, Row


def monteclora(model, dtype="float32", **kwargs):
    given = {"target_modules": LINEARS, "r": 4, "lora_alpha": 6, **kwargs}
    return Row("LoraConfig", model, given, dtype=dtype, init=dtype == "float32")  # peft draws in the base's dtype


ROWS = [
    monteclora("mlp", monteclora_config=MontecloraConfig(num_samples=3, buffer_size=4)),
    monteclora("mlp3d", monteclora_config=MontecloraConfig(num_samples=2, buffer_size=3, use_entropy=True), r=2),
    monteclora("gpt", monteclora_config=MontecloraConfig(num_samples=2, buffer_size=1), target_modules=GPT, r=1),
    monteclora("mlp", "float64", monteclora_config=MontecloraConfig(num_samples=2, buffer_size=1), rank_pattern={"lin1": 2}),
    monteclora("mlp", monteclora_config=MontecloraConfig(buffer_size=2), target_modules=["lin0"], lora_bias=True),
]
