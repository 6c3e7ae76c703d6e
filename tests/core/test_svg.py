"""Plots leave the caller's Matplotlib alone and are the same bytes each time."""

import subprocess
import sys

import pytest

from biscale_env.core.svg import can_plot, save_svg, svg_axes

pytest.importorskip("matplotlib")


def test_the_same_figure_is_the_same_file(tmp_path):
    assert can_plot()
    for name in ("a.svg", "b.svg"):
        figure, axes = svg_axes(1, 2, (4.0, 2.0), sharey=True)
        axes[0].plot([0, 1], [1, 0])
        save_svg(figure, tmp_path / name, bbox_inches="tight")
    text = (tmp_path / "a.svg").read_bytes()
    assert text.startswith(b"<?xml")
    assert text == (tmp_path / "b.svg").read_bytes()


@pytest.mark.slow
def test_backend_and_settings_stay_as_they_were(tmp_path):
    code = """
import sys
from pathlib import Path
import matplotlib
salt = matplotlib.rcParams["svg.hashsalt"]
from biscale_env.core.svg import save_svg, svg_axes
figure, axes = svg_axes(1, 1, (2.0, 2.0))
save_svg(figure, Path("x.svg"))
assert matplotlib.rcParams["svg.hashsalt"] == salt
assert "matplotlib.pyplot" not in sys.modules  # which would choose a backend
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
