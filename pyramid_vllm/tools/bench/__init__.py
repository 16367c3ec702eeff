"""Stock vLLM against KV policies: the same requests in the same KV bytes."""
