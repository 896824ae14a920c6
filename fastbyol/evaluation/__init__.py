"""Evaluation of what was learnt: frozen features, linear and kNN protocols, two baselines computed the same way, and the report."""
