"""Mechanisms that limit: a package each, behind the small protocol of ``backends.protocol``."""
