"""What a policy has done since the engine started."""

from dataclasses import dataclass


@dataclass
class PolicyCounters:
    """What the policy has done since start-up."""

    num_compactions: int = 0
    """Times that a request was compacted."""
    num_evicted_tokens: int = 0
    """Evicted and pruned tokens, summed over layers."""
    num_pages_freed: int = 0
    """Pages that evictions gave back to the block pool."""
    max_num_running: int = 0
    """Most sequences running at once."""
    num_groups: int = 0
    """Groups of generated tokens that were compressed."""
    num_unpruned_requests: int = 0
    """Requests whose output needs every row of the prompt, in a policy that prunes."""
    num_refused_requests: int = 0
    """Requests that could not be served, and ended with an error."""
    num_capped_outputs: int = 0
    """Requests that may end where the whole pool does, before their own limit."""
