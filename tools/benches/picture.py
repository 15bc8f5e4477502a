"""Rate over time for each method, a frame for each cell, drawn by matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benches.methods import METHODS
from benches.report import CellResult, Result
from benches.transfer import STEP_S

_COLUMNS = 2
# A method has the same colour in each frame.
_COLORS = [method.name for method in METHODS]
_FRAME_INCHES = (6.0, 3.0)
# What is far above the limit, as without one, would press all else flat.
_TOP_RATIO = 2.0


class PictureError(Exception):
    """No picture can be drawn; the text says why, and what to do."""


def check(file: Path) -> None:
    """Raise PictureError now, and not after an hour of measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PictureError(
            "--picture needs matplotlib: pip install matplotlib, or this project's dev extra"
        )
    if file.suffix not in (".svg", ".png"):
        raise PictureError(f"--picture {file}: give a name that ends in .svg or .png")


def draw(result: Result, file: Path) -> None:
    """Draw the first round of each method in each cell that has one."""
    from matplotlib.figure import Figure

    cells = [cell for cell in result.cells if cell.rounds]
    columns = min(_COLUMNS, len(cells)) or 1
    rows = -(-len(cells) // columns) or 1
    width, height = _FRAME_INCHES
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    frames = list(figure.subplots(rows, columns, squeeze=False).flat)
    for frame, cell in zip(frames, cells):
        _frame(frame, cell)
    for frame in frames[len(cells) :]:
        frame.remove()
    figure.savefig(file)


def _frame(frame: Any, result: CellResult) -> None:
    allowed = result.cell.rate.bytes_per_s * STEP_S
    for name, outcomes in result.rounds.items():
        ratios = [count / allowed for count in outcomes[0].timeline]
        if min(ratios) > _TOP_RATIO:
            continue
        times = [(number + 0.5) * STEP_S for number in range(len(ratios))]
        frame.plot(times, ratios, f"C{_COLORS.index(name)}", label=name, linewidth=1)
    frame.axhline(1, color="black", linewidth=0.5)
    frame.set(title=str(result.cell), xlabel="seconds", ylabel="rate over limit")
    frame.set_ylim(0, _TOP_RATIO)
    frame.legend(loc="upper right", fontsize="small", ncols=2)
