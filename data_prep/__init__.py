"""Scripts that prepare data: arguments, then one call into fastbyol.data. Run each as a script, not as a module."""
