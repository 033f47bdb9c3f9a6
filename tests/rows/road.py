"""Parity rows of road."""

from rows.row import LINEARS, Row

ROWS = [
    Row("RoadConfig", "mlp", {"target_modules": LINEARS, "group_size": 4}),
    Row("RoadConfig", "mlp3d", {"target_modules": LINEARS, "group_size": 8, "variant": "road_2"}),
    Row("RoadConfig", "mlp", {"target_modules": LINEARS, "group_size": 2, "variant": "road_4", "init_weights": False}),
]  # fmt: skip
