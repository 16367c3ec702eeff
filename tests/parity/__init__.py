"""Every Triton kernel's cases: inputs, the torch reference, and the tolerance.

``tests/test_kernels_triton.py`` runs them interpreted on the CPU, ``scripts/gpu-check``
on a GPU. They need torch and Triton alone: neither vLLM nor pytest is imported here.
"""
