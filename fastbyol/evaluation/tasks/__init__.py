"""The paper's evaluation tasks, one file or folder each, and the shape that they share: settings, job, training, result."""
