"""Kubernetes: limits that pods have by annotation, as rules for the daemon of their node."""
