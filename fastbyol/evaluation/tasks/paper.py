"""Figures of the paper (Grill et al., NeurIPS 2020), per cent, by row and column of our tables; tables are numbered as in arXiv v3."""

from __future__ import annotations

LINEAR: dict[str, dict[str, float]] = {
    "paper: BYOL": {"top1": 74.3, "top5": 91.6},
    "paper: SimCLR": {"top1": 69.3, "top5": 89.0},
    "paper: supervised": {"top1": 76.4, "top5": 92.9},
}
"""Table 1, and the supervised baseline of appendix C.2: ImageNet, ResNet-50, 1000 epochs."""

FRACTIONS: dict[str, dict[float, tuple[float, ...]]] = {
    "paper: BYOL R50": {0.01: (53.2, 78.4), 0.1: (68.8, 89.0), 1.0: (77.7, 93.9)},
    "paper: SimCLR R50": {0.01: (48.3, 75.5), 0.1: (65.6, 87.8), 1.0: (76.0, 93.1)},
    "paper: SimCLR R50, repeated": {1.0: (76.5, 93.5)},
    "paper: supervised R50": {0.01: (25.4, 48.4), 0.1: (56.4, 80.4), 1.0: (76.5,)},
    "paper: BYOL R50 2x": {0.01: (62.2, 84.1), 0.1: (73.5, 91.7)},
    "paper: BYOL R50 4x": {0.01: (69.1, 87.9), 0.1: (75.7, 92.5)},
    "paper: BYOL R200 2x": {0.01: (71.2, 89.5), 0.1: (77.7, 93.7)},
}
"""Tables 2 and 8 (100 %): (top-1, top-5) on ImageNet, by the share of its labels."""
