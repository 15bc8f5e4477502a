"""``python -m pybpfthrottle``."""

from pybpfthrottle.cli.app import main

if __name__ == "__main__":
    main()
