"""Parity rows of BOFT; peft has further factors on a GPU only, see test_differences_rotations.py."""

from rows.row import CONVS, LINEARS, Row


def boft(model, targets=LINEARS, **kwargs):
    return Row("BOFTConfig", model, {"target_modules": targets, **kwargs}, single=True)


ROWS = [
    boft("mlp", boft_block_size=4),
    boft("mlp3d", boft_block_size=0, boft_block_num=2, bias="boft_only"),
    boft("mlp", boft_block_size=1, bias="all"),
    boft("mlp", boft_block_size=4, init_weights=False),
    boft("conv2d", CONVS, boft_block_size=4),
    boft("conv2d", CONVS, boft_block_size=0, boft_block_num=4, init_weights=False),
    boft("conv1x1", CONVS, boft_block_size=2),
]
