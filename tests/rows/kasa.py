"""Parity rows of KaSA. peft truncates the base in float32, and draws d in the base's dtype."""

from peft import KasaConfig

from rows.row import LINEARS, Row


def kasa(model, dtype="float32", **kwargs):
    given = {"target_modules": LINEARS, "r": 2, "lora_alpha": 6, "kasa_config": KasaConfig(), **kwargs}
    return Row("LoraConfig", model, given, single=True, dtype=dtype)


ROWS = [
    kasa("mlp"),
    kasa("mlp3d", use_rslora=True, rank_pattern={"lin1": 1}),
    kasa("mlp", init_lora_weights=False, kasa_config=KasaConfig(beta=0.5, gamma=0.0)),
    kasa("mlp", target_modules=["lin0", "lin2"], lora_bias=True, bias="lora_only"),
]
