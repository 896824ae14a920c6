"""Transfer to the paper's classification sets: a linear classifier on frozen features, or the whole network fine-tuned (table 3)."""
