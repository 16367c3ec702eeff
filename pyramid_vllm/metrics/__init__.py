"""The policy's metrics in vLLM's: counters, gauges, log line, spans."""
