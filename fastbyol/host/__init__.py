"""This machine and this process: signals, durable files, progress, threads, memory, compiled kernels."""
