"""The policy on a GPU: kernels for all requests of a step, nothing that waits."""
