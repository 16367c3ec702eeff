"""vLLM's model runners, as the policy uses them."""
