"""Loggers that leave logging alone until somebody listens."""

from __future__ import annotations

import logging
import subprocess
import sys

from pybpfthrottle.logger import INFO, Logger


def run(code):
    """What a new Python prints, to standard output and to standard error."""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


LOG = "import sys; from pybpfthrottle.logger import Logger; log = Logger('pybpfthrottle.x')\n"


def test_nobody_listens_to_a_program_that_has_not_imported_logging():
    """Without logging, nothing is printed at any level, and logging is not imported either."""
    code = LOG + "log.warning('w %s', 1); log.error('e'); log.debug('d')\n"
    assert run(code + "print('logging' in sys.modules)") == ("False\n", "")


def test_a_library_prints_nothing_by_itself():
    """With logging imported and not configured, not even warnings are printed."""
    assert run("import logging\n" + LOG + "log.warning('w'); log.error('e')") == ("", "")


def test_who_listens_gets_everything(caplog):
    """With logging configured, each record has its logger, level, arguments and place."""
    caplog.set_level(logging.DEBUG, logger="pybpfthrottle.some")
    log = Logger("pybpfthrottle.some")
    log.debug("about %d", 1)
    log.log(INFO, "more")
    found = [(one.name, one.levelname, one.getMessage(), one.filename) for one in caplog.records]
    assert found == [
        ("pybpfthrottle.some", "DEBUG", "about 1", "test_logger.py"),
        ("pybpfthrottle.some", "INFO", "more", "test_logger.py"),
    ]
