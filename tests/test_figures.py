"""plumbing/figures.py: PNGs from matplotlib, which is imported only by who draws."""

import subprocess
import sys

from matplotlib.figure import Figure

from plumbing.figures import save_curve, save_figure
from plumbing.pictures import read_array


def test_curve_and_figure(tmp_path):
    save_curve(tmp_path / "loss.png", [3.0, 2.0, 1.0] * 20, "loss")
    assert read_array(tmp_path / "loss.png").shape == (420, 720, 3)
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    save_figure(tmp_path / "figure.png", figure, dpi=50)
    assert read_array(tmp_path / "figure.png").shape == (50, 100, 3)


def test_importing_costs_nothing():
    lines = "import sys, plumbing.figures, plumbing.pictures, evaluate; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lines]).returncode == 0
