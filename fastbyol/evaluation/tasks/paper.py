"""Figures of the paper (Grill et al., NeurIPS 2020), per cent, by row and column of our tables; tables are numbered as in arXiv v3."""

from __future__ import annotations

LINEAR: dict[str, dict[str, float]] = {
    "paper: BYOL": {"top1": 74.3, "top5": 91.6},
    "paper: SimCLR": {"top1": 69.3, "top5": 89.0},
    "paper: supervised": {"top1": 76.4, "top5": 92.9},
}
"""Table 1, and the supervised baseline of appendix C.2: ImageNet, ResNet-50, 1000 epochs."""
