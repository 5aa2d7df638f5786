"""The dashboard and the window: what Gymnasium asks of them, and that frames show the episode."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordVideo, RenderCollection

import thermoe_env  # noqa: F401  (registers the ids)
from moe.workload import KNOB_NAMES
from thermoe_env.env import ThermalMoEEnv
from thermoe_env.mdp.signals import STAGES
from thermoe_env.problem.problem import Problem
from thermoe_env.render import HEIGHT, WIDTH, Dashboard


def play(env: gymnasium.Env, steps: int, seed: int = 0) -> None:
    env.reset(seed=seed)
    env.action_space.seed(seed)
    for _ in range(steps):
        env.step(env.action_space.sample())


def frame_of(env: gymnasium.Env) -> np.ndarray:
    frame: Any = env.render()
    assert frame.shape == (HEIGHT, WIDTH, 3) == (540, 960, 3) and frame.dtype == np.uint8
    return frame


@pytest.mark.parametrize("mode", [None, "rgb_array", "human"])
def test_the_checker_accepts_every_render_mode(mode: str | None, problem: Problem) -> None:
    """Warnings are errors here; the checker itself makes an environment of every declared mode."""
    env = gymnasium.make("ThermalMoETwin-v0", scenario=problem.scenario, render_mode=mode)
    assert env.metadata["render_modes"] == ["human", "rgb_array"]
    check_env(env.unwrapped)
    env.close()
    env.close()


def test_frames_follow_the_episode_and_nothing_else(problem: Problem) -> None:
    """Equal episodes give equal frames, also after another one, and drawing changes no observation."""
    drawn, plain = (ThermalMoEEnv(problem.scenario, "twin", render_mode=mode) for mode in ("rgb_array", None))
    assert plain.render() is None
    play(drawn, 7, seed=1)
    drawn.render()
    frames = []
    for env in (drawn, ThermalMoEEnv(problem.scenario, "twin", render_mode="rgb_array")):
        play(env, 5)
        frames.append(frame_of(env))
    np.testing.assert_array_equal(*frames)
    np.testing.assert_array_equal(drawn.render(), frames[0])
    play(plain, 5)
    action = drawn.action_space.sample()
    np.testing.assert_array_equal(drawn.step(action)[0], plain.step(action)[0])
    assert (frame_of(drawn) != frames[0]).any()


def test_a_frame_shows_the_quantities_of_the_intervals(problem: Problem) -> None:
    """What the artists hold, against the infos that an environment gave."""
    env = ThermalMoEEnv(problem.scenario, "twin", render_mode="rgb_array")
    dashboard = env._dashboard
    assert isinstance(dashboard, Dashboard)
    shade: Any = dashboard._shade
    legend: Any = dashboard._plots[0][0].get_legend()
    env.action_space.seed(0)
    env.reset(seed=3)
    infos = [env.step(env.action_space.sample())[4] for _ in range(100)]  # more than the window holds
    env.render()

    def shown(name: str) -> np.ndarray:
        return dashboard._lines[name].get_ydata()

    last = infos[-91:]
    for name in ("temp_c", "power_w"):
        assert shown(name).tolist() == [info["reading"][name] for info in last]
    assert shown("budget_w").tolist() == [info["budget_w"] for info in last]
    assert shade.get_array()[0].tolist() == [STAGES.index(info["stage"]) for info in last[1:]]
    energy_j, good = (
        sum(info[of][key] for info in infos) for of, key in (("reading", "energy_j"), ("work", "good"))
    )
    assert shown("mj_per_good")[-1] == pytest.approx(1e3 * energy_j / good)
    assert dashboard._tiles[-1].get_text() == f"{1e3 * energy_j / good:.2f}"
    heights = np.array([bar.get_height() for bar in dashboard._bars])
    tokens = infos[-1]["tokens_per_expert"]
    np.testing.assert_allclose(heights, (tokens / tokens.sum(1, keepdims=True)).mean(0) * tokens.shape[1])
    np.testing.assert_array_equal(dashboard._ahead.get_ydata(), env._budget[99:110])
    for name, (mark, text) in dashboard._marks.items():
        value = infos[-1]["knobs"][name]
        assert float(text.get_text()) == value
        assert len(mark.get_xdata()) == 1 + problem.knobs.levels[name].index(value)
    assert set(dashboard._marks) == set(problem.scenario.knobs) < set(KNOB_NAMES)
    assert legend.get_texts()[1].get_text() == f"virtual limit {problem.scenario.limits.temperature_c:g}"


def test_a_hotter_device_is_drawn_higher_and_the_limit_stays(problem: Problem) -> None:
    """The red line of the temperature, found in the pixels."""
    dashboard = Dashboard(problem, "twin")
    rows = {}
    for temp_c in (45.0, 60.0):
        dashboard.begin(temp_c, 100.0, 0)
        dashboard._series["temp_c"][:] = temp_c
        red, *others = dashboard.frame()[96:206, 60:380].astype(float).T
        redness = np.maximum(0.0, red - np.max(others, 0)).sum(0)  # [rows]
        rows[temp_c] = np.average(np.arange(110), weights=redness)
    low, high = problem.limit_c - 30.0, problem.limit_c + 4.0
    assert rows[45.0] - rows[60.0] == pytest.approx(110 * 15.0 / (high - low), abs=1.0)


def test_a_film_is_made(problem: Problem, tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    imageio_ffmpeg: Any = pytest.importorskip("imageio_ffmpeg")
    scenario = {"scenario": problem.scenario, "overrides": {"episode_s": 10}}
    env = gymnasium.make("ThermalMoETwin-v0", render_mode="rgb_array", **scenario)
    env = RecordVideo(env, str(tmp_path / "film"), disable_logger=True)
    play(env, 10)
    last = frame_of(env.unwrapped)
    env.close()
    (film,) = (tmp_path / "film").glob("*.mp4")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", film, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True)
    assert b" 960x540" in decoded.stderr and b" 10 fps" in decoded.stderr
    frames = np.frombuffer(decoded.stdout, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
    assert len(frames) == 11  # after the reset and each of ten intervals
    assert np.abs(frames[-1].astype(float) - last).mean() < 5.0


def test_frames_can_be_collected(problem: Problem) -> None:
    env = RenderCollection(ThermalMoEEnv(problem.scenario, "twin", render_mode="rgb_array"))
    play(env, 3)
    frames: Any = env.render()
    assert len(frames) == 4 and all((one != other).any() for one, other in pairwise(frames))


def test_the_window_shows_the_frame_and_closes(problem: Problem) -> None:
    import pygame

    env = ThermalMoEEnv(problem.scenario, "twin", render_mode="human")
    play(env, 2)
    assert env.render() is None and env._dashboard is not None
    on_screen = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    np.testing.assert_array_equal(on_screen, env._dashboard.frame())
    env.close()
    assert not pygame.display.get_init()
    env.close()


def test_refusals_name_the_remedy(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"None or one of \['human', 'rgb_array'\], got 'ansi'"):
        ThermalMoEEnv(problem.scenario, "twin", render_mode="ansi")
    env = ThermalMoEEnv(problem.scenario, "twin", render_mode="rgb_array")
    with pytest.raises(gymnasium.error.ResetNeeded, match="before render"):
        env.render()
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(gymnasium.error.DependencyNotInstalled, match=r"thermalmoe\[ecosystem\]"):
        ThermalMoEEnv(problem.scenario, "twin", render_mode="human")


def test_the_live_world_is_drawn_and_has_a_vector_reward_too() -> None:
    arguments = {"overrides": {"interval_s": 0.5}, "render_mode": "rgb_array"}
    env = gymnasium.make("ThermalMoELiveMO-v0", **arguments)
    assert gymnasium.spec("ThermalMoELiveMO-v0").nondeterministic
    env.reset(seed=0)
    reward: Any = env.step(env.action_space.sample())[1]
    assert reward in env.unwrapped.reward_space  # pyright: ignore[reportAttributeAccessIssue]
    frame_of(env)
    env.close()
