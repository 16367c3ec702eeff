"""The one error that bad policy settings raise."""


class KVPolicyError(ValueError):
    """A KV policy, or the set-up around it, is not valid or not supported."""
