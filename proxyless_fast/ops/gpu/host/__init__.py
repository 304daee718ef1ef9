"""The host's side: which kernels run on what, with which block sizes, and how they make up an op."""
