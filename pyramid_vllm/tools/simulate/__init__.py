"""Real schedulers on a modelled device: what a policy does to traffic, without one."""
