"""verify-setup: whether this machine can limit, if not exactly why, and what to do."""
