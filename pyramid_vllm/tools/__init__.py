"""The command line and what stands beside the engine: measure, simulate, look into."""
