"""What an environment with a ``render_mode`` draws on."""

import sys
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.render.picture import picture
from biscale_env.render.strips import SPAN_S, Recent, Strip
from biscale_env.render.text_screen import CLEAR, text_frame

RENDER_MODES: Final = ("ansi", "rgb_array", "human")
RENDER_FPS: Final = 20  # of videos; a frame is a step


class Screen(Recent):
    """The last seconds of one environment, drawn as its mode says."""

    def __init__(
        self, mode: str, title: str, strips: Sequence[Strip], span_s: float = SPAN_S
    ) -> None:
        """Prepare an empty screen.

        Args:
            mode: one of :data:`RENDER_MODES`.
            title: heading.
            strips: from top to bottom.
            span_s: seconds shown.
        """
        super().__init__(title, strips, span_s)
        self.mode = mode

    def frame(self) -> str | NDArray[np.uint8]:
        """The text of ``ansi`` and ``human``, the picture of ``rgb_array``."""
        return picture(self) if self.mode == "rgb_array" else text_frame(self)

    def show(self) -> None:
        """Write the text to standard output in place of the last one, where that is a terminal."""
        before = CLEAR if sys.stdout.isatty() else ""
        print(before + text_frame(self), flush=True)
