"""Ordeals: each system call refused or followed by a kill, and hours of changes at random."""
