"""Executes and compiles the kernels of csrc/cuda without a GPU."""
