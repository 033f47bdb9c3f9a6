"""Parity rows of BD-LoRA, whose blocked factor peft draws in the base's dtype."""

from peft import BdLoraConfig

from rows.row import LINEARS, Row


def bdlora(model, **kwargs):
    config = BdLoraConfig(target_modules_bd_a=["lin0", "lin1"], target_modules_bd_b=["lin2"], nblocks=2)
    return Row(
        "LoraConfig",
        model,
        {"target_modules": LINEARS, "r": 4, "lora_alpha": 6, "use_bdlora": config, **kwargs},
        dtype="float32",
    )


ROWS = [
    bdlora("mlp"),
    bdlora("mlp3d", use_rslora=True),
    bdlora("mlp", use_bdlora=BdLoraConfig(target_modules_bd_b=["lin2"], nblocks=4, match_strict=False)),
]
