"""The GPU benchmark, the tuner of the kernels' table, and the models that need no GPU."""
