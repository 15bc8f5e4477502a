"""What tracing takes: probes, tracepoints, profiles, stacks and symbols."""
