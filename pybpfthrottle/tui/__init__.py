"""The full screen of ``pybpfthrottle top``: Textual lives here and nowhere else."""
