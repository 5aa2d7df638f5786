"""Figures that a person reads: their numbers are numbers."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure

from agents.evaluation.figures import STYLE, log_scale


def test_a_logarithmic_axis_has_plain_numbers() -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0.01, 100.0], [0.001, 10.0])
        log_scale(axes, "x", "y")
        figure.canvas.draw()
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label.get_text() for label in axis.get_ticklabels(which="both") if label.get_text()]
            assert labels and all(float(label.replace("−", "-")) > 0.0 for label in labels)
