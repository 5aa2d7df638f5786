"""The dashboard of an episode: frames drawn by matplotlib, a window for them by pygame.

Only an environment with a `render_mode` imports this module. Artists are made once. What a frame does not
move is drawn once, too, and again when the range of an axis grows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.error import DependencyNotInstalled, Error
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text

from moe.workload import KNOBS
from thermoe_env.mdp.signals import STAGES
from thermoe_env.problem.problem import Problem

WIDTH, HEIGHT = 960, 540
"""Of a frame, in pixels."""
WINDOW_S = 90.0
"""History in a frame."""

_SERIES = (
    "stage", "temp_c", "power_w", "budget_w", "load", "interactive", "deferrable", "accuracy", "confidence",
    "mj_per_good", "reward",
)  # fmt: skip
_STAGE = dict(zip(STAGES, range(len(STAGES)), strict=True))
_STAGE_COLOUR = ("#2f9e6e", "#d9a400", "#e8731a", "#c92a2a")
_STAGE_SHADE = ("#ffffff00", "#ffe08a66", "#ffb57866", "#ff8f8f66")
_INK, _FAINT, _PAPER = "#1f2933", "#7b8794", "#eef1f4"
_RED, _BLUE, _GREEN, _ORANGE, _VIOLET = "#c2410c", "#1d6fb8", "#13855c", "#d97706", "#7048b6"

_PLAYED = "_series", "_announced", "_played", "_energy_j", "_good", "_level", "_tokens"
"""What a `Dashboard` knows of its episode."""


class Dashboard:
    """What an environment did in the last `WINDOW_S` seconds of its episode, as a picture."""

    def __init__(self, problem: Problem, world: str) -> None:
        """Make the artists.

        Args:
            problem: what is played.
            world: `twin`, `live` or `live-cpu`; every frame says where its numbers come from.
        """
        self._problem, self._world = problem, world
        interval_s, ahead_s = problem.scenario.interval_s, problem.scenario.power_budget.notice_s
        self._time_s = np.arange(-round(WINDOW_S / interval_s), 1) * interval_s
        self._ahead_s = np.arange(0, round(ahead_s / interval_s) + 1) * interval_s
        self._figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor=_PAPER)
        self._canvas = FigureCanvasAgg(self._figure)
        self._lines: dict[str, Any] = {}
        self._plots: list[tuple[Axes, tuple[str, ...]]] = []
        self._least: dict[Axes, tuple[float, float]] = {}
        """Range with which an axis begins."""
        self._moving: list[Artist] = []
        """What a frame draws, in this order."""
        self._still: Any = None
        """The picture of all else, None where it has to be drawn."""
        self._header(world)
        self._device()
        self._service()
        self._knobs()
        self._experts()
        for artist in self._moving:
            artist.set_animated(True)  # left out where the figure is drawn as a whole

    def __getstate__(self) -> tuple[Any, ...]:
        """What was played, and the axes' ranges, as far as it has come. Artists are made again."""
        played = {name: value for name, value in vars(self).items() if name in _PLAYED}
        return self._problem, self._world, played, [axes.get_ylim() for axes in self._least]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Make the artists and continue."""
        problem, world, played, ranges = state
        self.__init__(problem, world)
        self.__dict__.update(played)
        for axes, limits in zip(self._least, ranges, strict=True):
            axes.set_ylim(limits)

    def begin(self, temp_c: float, power_w: float, stage: int) -> None:
        """Start an episode with the first reading; the past is empty."""
        self._series: dict[str, np.ndarray] = dict(
            zip(_SERIES, np.full((len(_SERIES), len(self._time_s)), np.nan), strict=True)
        )
        self._announced = np.full(len(self._ahead_s), np.nan)
        self._played, self._energy_j, self._good = 0, 0.0, 0.0
        self._append(temp_c=temp_c, power_w=power_w, stage=stage)
        self._level = dict(zip(KNOBS, self._problem.knobs.default_index, strict=True))
        self._tokens: np.ndarray | None = None
        for axes, least in self._least.items():
            axes.set_ylim(least)
        self._still = None

    def add(self, info: dict[str, Any], announced_w: np.ndarray) -> None:
        """Add an interval.

        Args:
            info: as `ThermalMoEEnv.step` returns it.
            announced_w: power budgets of the intervals to come, as far as they are announced.
        """
        work, capacity_rps, dt = info["work"], self._problem.capacity_rps, self._problem.scenario.interval_s
        answered = sum(work["answered"])
        arrived = sum(work["arrived"])
        self._played += 1
        self._energy_j += info["reading"]["energy_j"]
        self._good += work["good"]
        self._append(
            stage=_STAGE[info["stage"]],
            temp_c=info["reading"]["temp_c"],
            power_w=info["reading"]["power_w"],
            budget_w=info["budget_w"],
            load=arrived / (capacity_rps * dt),
            interactive=work["waiting"][0] / capacity_rps,
            deferrable=work["waiting"][1] / capacity_rps,
            accuracy=work["correct"] / answered if answered else np.nan,
            confidence=work["confidence"] if answered else np.nan,
            mj_per_good=1e3 * self._energy_j / self._good if self._good else np.nan,
            reward=sum(info["reward_terms"].values()),
        )
        self._announced = np.concatenate([[info["budget_w"]], announced_w])
        levels = self._problem.knobs.levels
        self._level = {name: levels[name].index(float(value)) for name, value in info["knobs"].items()}
        self._tokens = info["tokens_per_expert"]

    def frame(self) -> np.ndarray:
        """The picture, uint8 [`HEIGHT`, `WIDTH`, 3]."""
        for name, line in self._lines.items():
            line.set_ydata(self._series[name])
        for axes, names in self._plots:
            self._make_room(axes, np.concatenate([self._series[name] for name in names]))
        stage = self._series["stage"][1:]  # of the intervals between the times
        self._shade.set_data(np.ma.masked_invalid(stage)[None])
        self._ahead.set_ydata(self._announced)
        self._fill_header()
        self._fill_knobs()
        even = np.zeros(len(self._bars))
        if self._tokens is not None:
            share = self._tokens / np.maximum(self._tokens.sum(-1, keepdims=True), 1e-12)
            even = share.mean(0) * len(even)
        for bar, height in zip(self._bars, even, strict=True):
            bar.set_height(height)
        self._make_room(self._experts_axes, even)
        if self._still is None:
            self._canvas.draw()
            self._still = self._canvas.copy_from_bbox(self._figure.bbox)
        self._canvas.restore_region(self._still)
        for artist in self._moving:
            self._figure.draw_artist(artist)
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()

    def _append(self, **values: float) -> None:
        for name, series in self._series.items():
            series[:-1] = series[1:]
            series[-1] = values.get(name, np.nan)

    def _make_room(self, axes: Axes, values: np.ndarray) -> None:
        """Widen the range of an axis, and somewhat beyond, to values that it does not hold."""
        low, high = axes.get_ylim()
        seen = values[np.isfinite(values)]
        if len(seen) and (seen.min() < low or seen.max() > high):
            room = 0.2 * (max(high, seen.max()) - min(low, seen.min()))
            low = low if seen.min() >= low else float(seen.min()) - room
            axes.set_ylim(low, high if seen.max() <= high else float(seen.max()) + room)
            self._still = None

    def _axes(self, box: tuple[int, int, int, int], title: str) -> Axes:
        """Axes at (left, top, width, height) in pixels."""
        left, top, width, height = box
        axes = self._figure.add_axes(
            (left / WIDTH, 1.0 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT)
        )
        axes.set_title(title, loc="left", fontsize=8, color=_INK, pad=4, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c3cad2")
        axes.tick_params(labelsize=7, colors=_FAINT, length=2, pad=2)
        return axes

    def _plot(
        self,
        box: tuple[int, int, int, int],
        title: str,
        lines: Sequence[tuple[str, str, str]],
        least: tuple[float, float],
        timed: bool = False,
    ) -> Axes:
        """A plot over time of (series, colour, label), whose axis begins with the range `least`."""
        axes = self._axes(box, title)
        for name, colour, label in lines:
            (self._lines[name],) = axes.plot(
                self._time_s, np.zeros_like(self._time_s), color=colour, label=label, lw=1.4
            )
            self._moving.append(self._lines[name])
        axes.set_xlim(-WINDOW_S, self._ahead_s[-1])
        self._least[axes] = least
        axes.set_xticks([-90, -60, -30, 0], ["-90 s", "-60", "-30", "now"] if timed else [""] * 4)
        axes.locator_params(axis="y", nbins=4)
        axes.grid(color="#e9edf1", lw=0.7)
        axes.set_axisbelow(True)
        self._plots.append((axes, tuple(name for name, _, _ in lines)))
        return axes

    def _legend(self, axes: Axes) -> None:
        """Labels above the plot, right of its title."""
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.01, 0.97), ncols=4, frameon=False, fontsize=7,
            handlelength=1.2, columnspacing=0.9, handletextpad=0.4, borderpad=0.2, labelcolor=_INK,
        )  # fmt: skip

    def _header(self, world: str) -> None:
        gpu = self._problem.twin.gpu
        origin = {
            "twin": f"simulated (twin of {gpu})",
            "live-cpu": f"measured work, simulated device ({gpu})",
            "live": "measured (live)",
        }[world]
        self._text(20, 27, "ThermalMoE", 15, weight="bold")
        self._text(20, 47, f"scenario {self._problem.scenario.name}, {origin}", 7.5, colour=_FAINT)
        self._badge = self._text(430, 32, "", 9, "white", "bold", ha="center")
        self._badge.set_bbox({"boxstyle": "round,pad=0.45", "lw": 0})
        self._tiles: list[Text] = []
        captions = f"of {self._problem.scenario.episode_s} s", "die, °C", "power, W", "mJ per good answer"
        for left, caption in zip((510, 606, 702, 798), captions, strict=True):
            self._tiles.append(self._text(left, 31, "", 17, weight="bold"))
            self._text(left, 47, caption, 7.5, colour=_FAINT)
        self._moving += [self._badge, *self._tiles]

    def _text(
        self,
        left: int,
        top: int,
        text: str,
        size: float,
        colour: str = _INK,
        weight: str = "normal",
        **more: Any,
    ) -> Text:
        """Text at a pixel."""
        return self._figure.text(
            left / WIDTH, 1.0 - top / HEIGHT, text, fontsize=size, color=colour, weight=weight, **more
        )

    def _fill_header(self) -> None:
        stage = int(self._series["stage"][-1])
        self._badge.set_text(STAGES[stage])
        self._badge.get_bbox_patch().set_facecolor(_STAGE_COLOUR[stage])  # pyright: ignore[reportOptionalMemberAccess]
        mj = float(self._series["mj_per_good"][-1])
        values = [f"{self._played * self._problem.scenario.interval_s:g}"]
        values += [f"{self._series[name][-1]:.0f}" for name in ("temp_c", "power_w")]
        values.append("-" if np.isnan(mj) else f"{mj:.2f}" if mj < 100.0 else f"{mj:.0f}")
        for tile, value in zip(self._tiles, values, strict=True):
            tile.set_text(value)

    def _device(self) -> None:
        limit, budget = self._problem.limit_c, self._problem.scenario.power_budget
        die = ("temp_c", _RED, "hottest die")
        temperature = self._plot((52, 96, 372, 110), "Temperature, °C", [die], (limit - 30.0, limit + 4.0))
        line = temperature.axhline(limit, color=_INK, ls="--", lw=1.0, label=f"virtual limit {limit:g}")
        self._shade = temperature.imshow(
            np.zeros((1, len(self._time_s) - 1)), extent=(self._time_s[0], 0.0, 0.0, 1.0), aspect="auto",
            transform=temperature.get_xaxis_transform(), cmap=ListedColormap(_STAGE_SHADE), vmin=-0.5,
            vmax=len(STAGES) - 0.5, interpolation="nearest",
        )  # fmt: skip
        temperature.set_xlim(-WINDOW_S, self._ahead_s[-1])  # the image has set its own
        self._moving[:0] = [self._shade, line]
        self._legend(temperature)
        lines = [("power_w", _BLUE, "drawn"), ("budget_w", _INK, "budget")]
        power = self._plot((52, 242, 372, 110), "Power, W", lines, (0.0, 1.06 * budget.normal_w))
        self._lines["budget_w"].set(drawstyle="steps-pre", lw=1.0)
        (self._ahead,) = power.plot(
            self._ahead_s, np.zeros_like(self._ahead_s), color=_INK, ls=":", lw=1.4, drawstyle="steps-pre",
            label="announced",
        )  # fmt: skip
        self._moving.append(self._ahead)
        power.axvspan(0.0, self._ahead_s[-1], color="#f4f6f8", lw=0, zorder=0)
        self._legend(power)

    def _service(self) -> None:
        lines = [
            ("load", _INK, "load"),
            ("interactive", _RED, "interactive, s"),
            ("deferrable", _BLUE, "deferrable, s"),
        ]
        self._legend(self._plot((52, 388, 372, 110), "Load and queue", lines, (0.0, 1.5), timed=True))
        lines = [("accuracy", _GREEN, "accuracy"), ("confidence", _ORANGE, "confidence")]
        self._legend(self._plot((468, 96, 232, 110), "Answers", lines, (0.0, 1.05)))
        lines = [("mj_per_good", _VIOLET, "")]
        self._plot((468, 242, 232, 110), "mJ per good answer so far", lines, (0.0, 10.0))
        lines = [("reward", _GREEN, "")]
        axes = self._plot((468, 388, 232, 110), "Reward per interval", lines, (-0.5, 0.5), timed=True)
        axes.axhline(0.0, color="#c3cad2", lw=0.8)

    def _knobs(self) -> None:
        """A row per controlled knob: name, value, and its levels, filled up to the one in force."""
        controlled = self._problem.knobs.controlled
        axes = self._axes((752, 96, 193, 256), "Knobs")
        axes.set_axis_off()
        axes.set(xlim=(0.0, 1.0), ylim=(max(5, len(controlled)), 0.0))
        self._marks: dict[str, tuple[Any, Text]] = {}
        for row, name in enumerate(controlled):
            at = self._level_places(name)
            style: dict[str, Any] = {"ls": "", "marker": "s", "ms": 8, "mew": 0}
            axes.plot(at, np.full_like(at, row + 0.68), color="#d5dbe1", **style)
            (mark,) = axes.plot(at, np.full_like(at, row + 0.68), color=_BLUE, **style)
            axes.text(0.0, row + 0.32, name.replace("_", " "), fontsize=7.5, color=_INK)
            value = axes.text(1.0, row + 0.32, "", fontsize=8, color=_INK, ha="right", weight="bold")
            self._marks[name] = mark, value
            self._moving += [mark, value]

    def _level_places(self, name: str) -> np.ndarray:
        return 0.025 + 0.07 * np.arange(len(self._problem.knobs.levels[name]))

    def _fill_knobs(self) -> None:
        for name, (mark, value) in self._marks.items():
            level, places = self._level[name], self._level_places(name)[: self._level[name] + 1]
            mark.set_data(places, np.full(len(places), mark.get_ydata()[0]))
            value.set_text(f"{self._problem.knobs.levels[name][level]:g}")

    def _experts(self) -> None:
        count, top = self._problem.profile.expert_share.shape[-1], 388
        self._experts_axes = self._axes((752, top, 193, 110), "Expert use (even load: 1)")
        self._bars = self._experts_axes.bar(np.arange(count), np.zeros(count), color=_VIOLET, width=0.7)
        even = self._experts_axes.axhline(1.0, color=_INK, lw=0.8, ls=":")
        self._least[self._experts_axes] = 0.0, 2.0
        self._moving += [*self._bars, even]
        self._experts_axes.locator_params(axis="both", nbins=8, integer=True)


class Window:
    """A window for frames, by pygame; it opens with the first one."""

    def __init__(self, frames_per_s: float) -> None:
        """Show at most so many frames per second.

        Raises:
            DependencyNotInstalled: pygame is missing.
        """
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        try:
            import pygame
        except ImportError as error:
            raise DependencyNotInstalled(
                "render_mode='human' opens a window with pygame, which is not installed: "
                "pip install 'thermalmoe[ecosystem]', or take frames by render_mode='rgb_array'"
            ) from error
        self._pygame, self._frames_per_s = pygame, frames_per_s
        self._clock, self._screen = pygame.time.Clock(), None

    def __getstate__(self) -> Any:
        """Refuse.

        Raises:
            TypeError: a window is on one screen, once.
        """
        raise TypeError(
            "an environment with a window cannot be copied or pickled: make it with "
            "render_mode='rgb_array', and show its frames"
        )

    def show(self, frame: np.ndarray) -> None:
        """Put a frame, uint8 [height, width, 3], on the screen.

        Raises:
            Error: there is no screen.
        """
        if self._screen is None:
            self._screen = self._open(frame.shape[1], frame.shape[0])
        self._screen.blit(self._pygame.surfarray.make_surface(frame.swapaxes(0, 1)), (0, 0))
        self._pygame.event.pump()  # else the desktop takes the window for hung
        self._pygame.display.flip()
        self._clock.tick(self._frames_per_s)

    def _open(self, width: int, height: int) -> Any:
        try:
            self._pygame.display.init()
            screen = self._pygame.display.set_mode((width, height))
        except self._pygame.error as error:
            raise Error(
                f"no window opens here ({error}): take frames by render_mode='rgb_array', or set "
                "SDL_VIDEODRIVER=dummy"
            ) from error
        self._pygame.display.set_caption("ThermalMoE")
        return screen

    def close(self) -> None:
        """Close the window. May be called twice."""
        if self._screen is not None:
            self._pygame.display.quit()
            self._screen = None
