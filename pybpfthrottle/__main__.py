"""The entry point, of ``python -m pybpfthrottle`` too."""

from __future__ import annotations

import gc
import sys

# To look for garbage among the first thousands of objects, which all stay, takes a tenth of a
# start.
_GARBAGE_AFTER = 50_000


def main() -> None:
    """Import the command line, which takes a moment: Ctrl-C may come already."""
    gc.set_threshold(_GARBAGE_AFTER)
    try:
        from pybpfthrottle.cli import app

        app.main()
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in ("click", "elftools", "rich"):
            raise
        sys.exit(
            f"pybpfthrottle: error: the package {error.name} is missing (pip install"
            " pybpfthrottle); python3 -m pybpfthrottle.diagnostics does without click and rich"
        )


if __name__ == "__main__":
    main()
