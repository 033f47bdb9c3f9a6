"""Parity rows of oft."""

from rows.row import CONVS, LINEARS, Row

ROWS = [
    Row("OFTConfig", "mlp", {"target_modules": LINEARS, "oft_block_size": 4}, single=True),
    Row("OFTConfig", "mlp", {"target_modules": LINEARS, "oft_block_size": 4, "use_cayley_neumann": False}, single=True),
    Row("OFTConfig", "mlp", {"target_modules": LINEARS, "oft_block_size": 4, "num_cayley_neumann_terms": 3}, single=True),
    Row("OFTConfig", "mlp",
        {"target_modules": LINEARS, "oft_block_size": 0, "r": 2, "block_share": True, "bias": "oft_only"}, single=True),
    Row("OFTConfig", "mlp", {"target_modules": LINEARS, "oft_block_size": 4, "coft": True, "eps": 0.05}, single=True),
    Row("OFTConfig", "conv1x1", {"target_modules": CONVS, "oft_block_size": 4}, single=True),
]  # fmt: skip
