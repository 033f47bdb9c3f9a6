"""Parity rows of HiRA; peft ignores `rank_pattern` when it makes a layer: see test_differences_rotations.py."""

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
    hira("embedding", ["emb"], init_weights=False),
    hira("mlp3d", r=30),  # so many copies of the input that it meets the product of the matrices
]
