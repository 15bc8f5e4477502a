"""Rules: what is limited by itself, from files."""
