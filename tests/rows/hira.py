"""Parity rows of HiRA; peft ignores `rank_pattern` when it makes a layer, so there is none."""

from rows.row import CONVS, GPT, LINEARS, Row


def hira(model, targets=LINEARS, **kwargs):
    return Row("HiraConfig", model, {"target_modules": targets, "r": 4, **kwargs})


ROWS = [
    hira("mlp"),
    hira("mlp3d", init_weights="gaussian"),
    hira("mlp", init_weights=False),
    hira("gpt", GPT),
    hira("conv1d", CONVS),
    hira("conv2d", CONVS, init_weights="gaussian"),
    hira("conv3d", ["conv0"]),
    hira("conv1x1", CONVS),
    hira("embedding", ["emb", "lin0"]),
]
