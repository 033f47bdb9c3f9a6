"""Parity rows of MonteCLoRA in evaluation, where it is LoRA; the start consumes peft's pool of noise too."""

from peft import MontecloraConfig

from rows.row import LINEARS, Row


def monteclora(model, **kwargs):
    given = {"target_modules": LINEARS, "r": 4, "lora_alpha": 6, **kwargs}
    return Row("LoraConfig", model, given, dtype="float32")


ROWS = [
    monteclora("mlp", monteclora_config=MontecloraConfig(num_samples=3, buffer_size=4)),
    monteclora("mlp3d", monteclora_config=MontecloraConfig(num_samples=2, buffer_size=3, use_entropy=True), r=2),
]
