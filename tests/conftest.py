"""Lies beside compiled.py, so that all tests can import it."""
