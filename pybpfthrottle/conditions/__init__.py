"""Bad networks for one process: what is done to its packets."""
