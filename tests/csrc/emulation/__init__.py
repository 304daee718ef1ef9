"""Executes and compiles the kernels of csrc/cuda without a GPU: for tests, the package imports nothing of it."""
