"""vLLM's CPU platform with a Ray device key."""


def register() -> str | None:
    """Entry point of the ``vllm.platform_plugins`` group."""
    return None
