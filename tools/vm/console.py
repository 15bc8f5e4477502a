"""A shell on the serial console of a machine, as a person types into it."""

from __future__ import annotations

import codecs
import os
import re
import select
import subprocess
import time
from typing import IO, Optional

from vm import VmError

# What a shell asks a terminal for, and how it moves the cursor.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Console:
    """Types commands and waits for the next prompt; ``text`` is all that was seen.

    A process whose standard streams are the serial line.
    """

    def __init__(self, process: subprocess.Popen[bytes], prompt: str, timeout_s: float) -> None:
        self._process = process
        self._prompt = prompt
        self._deadline = time.monotonic() + timeout_s
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""

    def wait_for_prompt(self) -> str:
        """Return what is shown until the next prompt, without it. Raises VmError."""
        begin = len(self.text)
        while not self.text[begin:].endswith(self._prompt):
            if not self._read():
                raise VmError(f"the machine has stopped; it said last:\n{self._end()}")
        return self.text[begin : -len(self._prompt)]

    def type(self, command: str) -> str:
        """Type a command, and return what it prints."""
        self._write(command)
        output = self.wait_for_prompt()
        # The line is echoed first.
        return output.partition("\n")[2]

    def type_last(self, command: str) -> None:
        """Type the command that ends the machine, and wait for that."""
        self._write(command)
        while self._read():
            pass

    def _write(self, command: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()

    def _read(self) -> bool:
        stream: Optional[IO[bytes]] = self._process.stdout
        assert stream
        left_s = self._deadline - time.monotonic()
        if left_s <= 0 or not select.select([stream], [], [], left_s)[0]:
            raise VmError(f"the machine was too slow; it said last:\n{self._end()}")
        data = os.read(stream.fileno(), 4096)
        # An escape sequence may come in two parts, and a line's end as well.
        shown = self.text + self._decoder.decode(data)
        self.text = _ESCAPES.sub("", shown).replace("\r\n", "\n")
        return bool(data)

    def _end(self) -> str:
        return self.text[-2000:]
