"""Formats of other programs that a trained encoder is written in: one file for each kind, the check of what was written, and the card."""
