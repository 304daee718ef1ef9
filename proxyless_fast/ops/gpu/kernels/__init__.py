"""Triton kernels. What is launched ends in `_kernel`; the rest is called by kernels."""
