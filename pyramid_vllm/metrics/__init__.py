"""The policy's metrics in vLLM's own: counters, gauges, the log line, spans."""
