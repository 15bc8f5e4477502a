"""The benchmarks of tools/bench: each has a module with ``configure(parser)`` and ``main``."""
