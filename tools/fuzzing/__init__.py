"""Broken inputs for whatever reads what others have written: the same ones for the same seed."""
