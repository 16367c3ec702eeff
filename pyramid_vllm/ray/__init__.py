"""vLLM on Ray clusters without GPUs."""
