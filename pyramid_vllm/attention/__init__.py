"""Stock attention backends with a KV policy, one file each."""
