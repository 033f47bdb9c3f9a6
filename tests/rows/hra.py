"""Parity rows of HRA."""

from rows.row import CONVS, LINEARS, Row


def hra(model, targets=LINEARS, init=True, **kwargs):
    return Row("HRAConfig", model, {"target_modules": targets, **kwargs}, init=init)


ROWS = [
    hra("mlp", r=4),
    hra("mlp3d", r=2, bias="hra_only"),
    hra("mlp", r=3, bias="all"),
    hra("mlp", r=4, init_weights=False),
    # peft starts orthogonalised vectors from equal pairs, which is degenerate: here they start apart
    hra("mlp", r=4, apply_GS=True, init=False),
    hra("mlp", r=4, apply_GS=True, init_weights=False),
    hra("conv2d", CONVS, r=2),
    hra("conv2d", CONVS, r=3, apply_GS=True, init_weights=False),
    hra("conv1x1", CONVS, r=2, init_weights=False),
]
