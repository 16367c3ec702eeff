"""``pyramid-vllm top``: a vLLM server's metrics over an interval."""
