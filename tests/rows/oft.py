"""Parity rows of OFT; a kernel larger than 1 is in test_peft_differences.py."""

from rows.row import CONVS, LINEARS, Row


def oft(model, targets=LINEARS, **kwargs):
    return Row("OFTConfig", model, {"target_modules": targets, **kwargs}, single=True)


ROWS = [
    oft("mlp", oft_block_size=4),
    oft("mlp3d", oft_block_size=4, use_cayley_neumann=False),
    oft("mlp", oft_block_size=4, num_cayley_neumann_terms=1, use_cayley_neumann=False),
    *(oft("mlp", oft_block_size=4, num_cayley_neumann_terms=t) for t in (2, 3, 6)),
    oft("mlp", oft_block_size=0, r=2, block_share=True, bias="oft_only"),
    oft("mlp", oft_block_size=4, coft=True, eps=0.05),
    oft("mlp", oft_block_size=4, coft=True, eps=0.05, block_share=True, use_cayley_neumann=False),
    oft("mlp", oft_block_size=4, init_weights=False, bias="all"),
    # sizes and numbers that do not divide 12, 16 or 8
    *(oft("mlp", oft_block_size=n) for n in (5, 32)),
    oft("mlp", oft_block_size=0, r=3),
    oft("conv1x1", CONVS, oft_block_size=4),
    oft("embedding", ["emb", "lin0"], oft_block_size=4),
    oft("embedding", ["emb"], oft_block_size=3, use_cayley_neumann=False, init_weights=False),
]
