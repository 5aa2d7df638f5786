"""The report in a real browser: on a phone, alone, with the numbers of summary.csv."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console

from agents.evaluation.command import EvaluateConfig, evaluate
from agents.evaluation.report import write_report
from moe.profiles import save_profile
from tests.thermoe_env.conftest import make_profile
from thermoe_env.configs import config_path

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = {"width": 360, "height": 740}
SMALLEST_PX = 14.0
SHOWN = {
    "#": ("rank", 1.0, 0), "mJ/good": ("j_per_good", 1e3, 2), "J/good": ("j_per_good", 1.0, 2),
    "vs static": ("j_per_good_vs_static", 1.0, 3), "quality": ("quality", 1.0, 3),
    "good/s": ("goodput_rps", 1.0, 0), "late %": ("late_fraction", 100.0, 2),
    "p50 s": ("latency_p50_s", 1.0, 3), "p95 s": ("latency_p95_s", 1.0, 2),
    "p99 s": ("latency_p99_s", 1.0, 2),
    "energy kJ": ("energy_j", 1e-3, 1), "mean W": ("mean_power_w", 1.0, 0),
    "over budget kJ": ("over_budget_j", 1e-3, 1), "peak °C": ("peak_c", 1.0, 1),
    "s above limit": ("above_limit_s", 1.0, 1), "s throttled": ("throttled_s", 1.0, 1),
    "expert entropy": ("expert_entropy", 1.0, 3), "TTT % of time": ("ttt_time_share", 100.0, 1),
    "return": ("return", 1.0, 1),
}  # fmt: skip
"""Column as readers see it: (column of summary.csv, factor, digits)."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an evaluation; in it long.html, with names too long for a phone and no feasible policy."""
    folder = tmp_path_factory.mktemp("report")
    save_profile(make_profile(), folder / "profile.json")
    raw = yaml.safe_load(config_path("scenarios", "vision", ".yaml").read_text())
    raw |= {"profile": str(folder / "profile.json"), "episode_s": 20, "knobs": ["batch_size", "expert_count"]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    out = folder / "out"
    config = EvaluateConfig(scenario=str(folder / "tiny.yaml"), seeds=3, out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERMALMOE_CACHE", str(folder / "cache"))
        results = evaluate(config, Console(quiet=True))
    report = (out / "report.html").read_bytes()
    name = "train-20260101-000000-recurrent_ppo_with_" + 40 * "x"
    table = results.summary.assign(rank=pd.NA, infeasible="late 9.00% > 1.00%", policy=name)
    table.loc[0, ["j_per_good", "j_per_good_vs_static"]] = float("inf")
    figures = [(f"Figure {i} of {name}", path) for i, path in enumerate((out / "figures").glob("*.png"))]
    write_report(out, f"{name}: /{'folder/' * 30}", 300 * "s", table, figures, [f"{name}: <b>cut</b>"])
    (out / "report.html").rename(out / "long.html")
    (out / "report.html").write_bytes(report)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=sandbox)
        except sync_api.Error as error:
            pytest.skip(f"needs a browser: {found} does not start ({error.message.splitlines()[0]})")
        yield browser
        browser.close()


@pytest.fixture
def phone(browser: Any) -> Iterator[Any]:
    """A page of a phone; what it asks for and complains of is refused afterwards."""
    page = browser.new_page(viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True)
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    outside = [url for url in requests if not url.startswith("data:")]
    assert len(outside) == 1 and outside[0].startswith("file:")  # the report itself
    assert not complaints
    page.close()


def fits(page: Any) -> bool:
    """Nothing makes the page scroll sideways."""
    width, viewport = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    return viewport == PHONE["width"] and width <= viewport


@pytest.mark.parametrize("name", ["report", "long"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_is_readable_on_a_phone(phone: Any, run: Path, name: str, scheme: str) -> None:
    phone.emulate_media(color_scheme=scheme)
    phone.goto((run / f"{name}.html").as_uri())
    assert fits(phone)
    images = phone.eval_on_selector_all(
        "img", "all => all.map(i => [i.naturalWidth, i.getBoundingClientRect().right, i.alt])"
    )
    assert len(images) == len(list((run / "figures").glob("*.png"))) >= 6
    assert all(natural > 0 and right <= PHONE["width"] and alt for natural, right, alt in images)
    phone.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    sizes = phone.evaluate("""() => {
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), sizes = []
        while (walker.nextNode())
            if (walker.currentNode.data.trim())
                sizes.push(parseFloat(getComputedStyle(walker.currentNode.parentElement).fontSize))
        return sizes
    }""")
    assert len(sizes) > 100 and min(sizes) >= SMALLEST_PX
    assert fits(phone)  # with all that is folded open, figures at their own size as well
    page, text = phone.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (page, text)]
    assert (brightness[0] > brightness[1]) == (scheme == "light") and abs(brightness[0] - brightness[1]) > 450


def test_a_tap_enlarges_a_figure_inside_its_box(phone: Any, run: Path) -> None:
    phone.goto((run / "report.html").as_uri())
    image = phone.locator("figure img").first
    width = lambda: image.evaluate("i => [i.getBoundingClientRect().width, i.naturalWidth]")  # noqa: E731
    small, natural = width()
    assert small < PHONE["width"] < natural
    image.tap()
    assert width()[0] == natural and fits(phone)
    image.tap()
    assert width()[0] == small


def test_headline_comes_first_and_names_stay_in_sight(phone: Any, run: Path) -> None:
    phone.goto((run / "report.html").as_uri())
    tops = phone.eval_on_selector_all(
        ".headline, .wide, figure:first-of-type, details.fold",
        "all => all.map(e => e.getBoundingClientRect().top)",
    )
    assert tops == sorted(tops) and len(tops) == 6
    best = pd.read_csv(run / "summary.csv").set_index("rank").loc[1]
    headline = phone.locator(".headline").inner_text()
    assert str(best.policy) in headline and f"{1e3 * best.j_per_good:.2f} mJ per good answer" in headline
    phone.locator(".wide").evaluate("box => { box.scrollLeft = 400 }")
    assert phone.locator(".wide").evaluate("box => box.scrollLeft") == 400
    box, name = (phone.locator(place).first.bounding_box() for place in (".wide", "tbody .policy"))
    assert name["x"] == pytest.approx(box["x"], abs=2.0)


def test_table_holds_the_numbers_of_the_summary(phone: Any, run: Path) -> None:
    phone.goto((run / "report.html").as_uri())
    heads = phone.locator("thead th").all_inner_texts()
    cells = phone.eval_on_selector_all(
        "tbody tr",
        """all => all.map(row => [...row.cells].map(
            cell => [cell.firstChild.data, cell.querySelector('small')?.innerText]
        ))""",
    )
    summary = pd.read_csv(run / "summary.csv")
    assert len(cells) == len(summary) == 3 and set(heads) - {"policy"} <= set(SHOWN) and len(heads) == 19
    for row, record in zip(cells, summary.to_dict("records"), strict=True):
        for head, (text, below) in zip(heads, row, strict=True):
            if head == "policy":
                assert text == record["policy"] and (below == "infeasible") == isinstance(
                    record["infeasible"], str
                )
                continue
            name, factor, digits = SHOWN[head]
            if pd.isna(record[name]):
                assert text == "-"
                continue
            step = 0.5000001 * 10.0**-digits
            assert float(text) == pytest.approx(factor * record[name], abs=step)
            if below:
                ends = [factor * record[f"{name}_{end}"] for end in ("low", "high")]
                assert [float(end) for end in below.split("-")] == pytest.approx(ends, abs=step)
        assert sum(below is not None for _, below in row[2:]) == 2  # energy, and energy relative to static


def test_nobody_feasible_is_said(phone: Any, run: Path) -> None:
    phone.goto((run / "long.html").as_uri())
    assert phone.locator(".headline").inner_text().startswith("No policy is feasible.")
    assert "∞" in phone.locator("tbody").inner_text()
    assert "<b>cut</b>" in phone.locator("body").inner_text()  # shown, not obeyed


def test_print_shows_what_is_folded(browser: Any, run: Path) -> None:
    page = browser.new_page(viewport={"width": 1047, "height": 740})  # A4 landscape within its margins
    page.goto((run / "report.html").as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1047
    right = page.locator("table").evaluate("t => t.getBoundingClientRect().right")
    assert right <= 1047 and page.locator("pre").first.is_visible()
    page.close()
