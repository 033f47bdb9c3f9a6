"""Parity rows of BD-LoRA, whose blocked factor peft draws in the base's dtype."""

from peft import BdLoraConfig

from rows.row import LINEARS, Row


def bdlora(model, dtype="float32", **kwargs):
    config = BdLoraConfig(target_modules_bd_a=["lin0", "lin1"], target_modules_bd_b=["lin2"], nblocks=2)
    return Row(
        "LoraConfig",
        model,
        {"target_modules": LINEARS, "r": 4, "lora_alpha": 6, "use_bdlora": config, **kwargs},
        dtype=dtype,
    )


ROWS = [
    bdlora("mlp"),
    bdlora("mlp3d", use_rslora=True),
    bdlora("mlp", init_lora_weights=False, rank_pattern={"lin1": 8, "lin2": 2}, alpha_pattern={"lin0": 3}),
    bdlora("mlp", "float64", use_bdlora=BdLoraConfig(target_modules_bd_b=["lin2"], nblocks=4, match_strict=False)),
]
