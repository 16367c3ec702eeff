"""What ``pyramid-vllm top`` shows: a vLLM server's metrics over an interval."""
