"""Tables of a token profile against its cells, and that the figures are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.token_profile import load_token_profile
from studies.token_surface import Arguments, main, page, savings, surface
from thermoe_env.configs import config_path


def profile():
    return load_token_profile(config_path("profiles", "h200-generate", ".json"))


def test_every_decode_step_of_the_grid_stands_in_the_page() -> None:
    text, cells = page(profile()), profile().cost.cells
    grid = [cell for cell in cells if not (cell.prefill_rows or cell.held_out) and cell.context == 300]
    assert len(grid) > 50
    for cell in grid:
        assert cell.energy_j is not None
        mj = 1e3 * cell.energy_j / cell.decode_rows
        assert f"{1e3 * cell.step_s:.3f}, **{mj:.3g}**, {cell.experts_read:.0f} |" in text


def test_the_cheapest_setting_loses_at_most_a_hundredth_and_none_that_does_is_cheaper() -> None:
    points = surface(profile())
    for saving in savings(points, 8):
        some = [point for point in points if point.running == saving.best.running]
        (standard,) = (point for point in some if (point.top_k, point.routing_bias) == (8, 0.0))
        assert saving.accuracy >= -0.01
        assert saving.best.mj_per_token == pytest.approx((1 + saving.mj_per_token) * standard.mj_per_token)
        for point in some:
            assert point.mj_per_token >= saving.best.mj_per_token or point.accuracy < 0.99 * standard.accuracy


def test_page_and_figures_are_written(tmp_path: Path) -> None:
    main(Arguments(out=tmp_path))
    assert (tmp_path / "tables.md").read_text() == page(profile())
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("cost", "front"))


def test_a_profile_without_energies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no energies"):
        main(Arguments(profile="cpu-generate", out=tmp_path))
