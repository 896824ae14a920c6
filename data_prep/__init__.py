"""Commands of `python -m fastbyol` that prepare data, as scripts of a checkout. Run each as a script, not as a module."""
