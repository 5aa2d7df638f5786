"""The energy budget: never more spent than earned, a bounded bank, refusals counted."""

import math
import subprocess
import sys
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.service.budget import EnergyBudget

WINDOW_S, RATE, FRACTION = 10.0, 3.0, 0.2
event = st.one_of(
    st.tuples(st.just("earn"), st.floats(0, 60), st.floats(0, 500)),
    st.tuples(st.just("charge"), st.floats(0, 80), st.just(0.0)),
)


def budget(bank_windows: int, initial_j: float) -> EnergyBudget:
    return EnergyBudget(
        window_s=WINDOW_S,
        bank_windows=bank_windows,
        joules_per_s=RATE,
        fraction=FRACTION,
        initial_j=initial_j,
    )


@given(st.lists(event, max_size=30), st.integers(0, 3), st.floats(0, 40))
def test_spent_is_at_most_earned_and_every_joule_is_somewhere(events, bank_windows, initial_j):
    purse = budget(bank_windows, initial_j)
    earned, charged, refused = initial_j, 0.0, 0
    for kind, amount, serving_j in events:
        if kind == "earn":
            serving_j = serving_j if amount else 0.0
            purse.earn(amount, serving_j)
            earned += RATE * amount + FRACTION * serving_j
        else:
            could, before = purse.afford(amount), purse.balance_j
            assert could == (amount <= before)
            assert purse.charge(amount) == could
            charged, refused = charged + could * amount, refused + (not could)
            assert could or purse.balance_j == before
        assert purse.balance_j >= 0
        assert charged <= earned * (1 + 1e-9) + 1e-9
        total = purse.balance_j + purse.charged_j + purse.expired_j
        assert math.isclose(total, earned, rel_tol=1e-9, abs_tol=1e-9)
        assert math.isclose(purse.earned_j, earned, rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(purse.charged_j, charged, rel_tol=1e-9, abs_tol=1e-9)
    assert purse.refused == refused


@given(st.lists(st.integers(0, 25), max_size=20), st.integers(0, 3))
def test_the_bank_holds_what_the_last_windows_earned(seconds, bank_windows):
    """Against a count of every second by its window; nothing is spent."""
    purse, earned, t = budget(bank_windows, 0.0), defaultdict[int, float](float), 0
    for duration in seconds:
        purse.earn(float(duration))
        for _ in range(duration):
            earned[t // int(WINDOW_S)] += RATE
            t += 1
        now = t // int(WINDOW_S)
        kept = sum(earned[window] for window in range(now - bank_windows, now + 1))
        assert math.isclose(purse.balance_j, kept, abs_tol=1e-6)
        assert purse.balance_j <= (bank_windows + 1) * WINDOW_S * RATE + 1e-6


@given(st.lists(st.floats(0.01, 30), min_size=1, max_size=20))
def test_it_does_not_matter_in_how_many_pieces_time_passes(pieces):
    whole, parts = budget(2, 5.0), budget(2, 5.0)
    whole.earn(math.fsum(pieces))
    for piece in pieces:
        parts.earn(piece)
    for name in ("earned_j", "expired_j", "balance_j"):
        # A window may end within rounding of the end of time; what it held expires then or just after.
        if abs((math.fsum(pieces) + 1e-6) % WINDOW_S) > 2e-6:
            assert math.isclose(getattr(whole, name), getattr(parts, name), rel_tol=1e-6, abs_tol=1e-4), name


def test_the_oldest_joules_are_spent_first():
    purse = EnergyBudget(window_s=1, bank_windows=1, joules_per_s=10)
    purse.earn(1.5)  # 10 J of the first window, 5 J of the second
    assert purse.charge(8)
    purse.earn(0.5)  # the second window ends, and the first one's last 2 J expire
    assert purse.expired_j == 2
    assert purse.balance_j == 10


@pytest.mark.parametrize("bank_windows", [0, 1, 3])
def test_the_share_is_whole_after_all_windows_at_full_load(bank_windows):
    """At half of the time half, at half of the load the share of it; and never more than the whole."""
    full_w, windows_s = 400.0, (bank_windows + 1) * WINDOW_S
    for load, time, expected in ((1.0, 0.5, 0.5), (1.0, 0.999, 0.999), (0.0, 0.999, 0.999 * 3 / 83)):
        purse = EnergyBudget(
            window_s=WINDOW_S, bank_windows=bank_windows, joules_per_s=RATE, fraction=FRACTION,
            full_serving_w=full_w,
        )  # fmt: skip
        seconds = time * windows_s
        purse.earn(seconds, load * full_w * seconds)
        assert purse.share == pytest.approx(expected)
    rich = EnergyBudget(window_s=WINDOW_S, initial_j=1e9, joules_per_s=RATE)
    assert rich.share == 1.0


def test_steps_are_paid_one_by_one_and_every_refused_one_is_counted():
    purse = EnergyBudget(window_s=10, fraction=0.5)
    assert purse.pay_steps(1.0, 20.0, 4.0, 5) == 2  # 10 J pay for two of 4 J
    assert (purse.refused, purse.charged_j, purse.balance_j) == (3, 8.0, 2.0)
    assert purse.pay_steps(1.0, 20.0, 4.0, 3) == 3
    assert (purse.refused, purse.balance_j) == (3, 0.0)


def test_a_refusal_is_no_end():
    purse = EnergyBudget(window_s=10, joules_per_s=1)
    assert not purse.charge(3)
    purse.earn(4)
    assert purse.charge(3)
    assert (purse.refused, purse.charged_j) == (1, 3)


def test_years_at_once_are_quick():
    purse = EnergyBudget(window_s=1e-3, bank_windows=2, joules_per_s=1)
    purse.earn(1e8)
    assert math.isclose(purse.earned_j, 1e8)
    assert math.isclose(purse.earned_j, purse.expired_j + purse.balance_j)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"joules_per_s": -1}, "joules_per_s must be finite and not negative"),
        ({"joules_per_s": math.nan}, "joules_per_s"),
        ({"joules_per_s": 1, "window_s": 0}, "window_s must be at least"),
        ({"joules_per_s": 1, "bank_windows": -1}, "bank_windows"),
        ({}, "something to earn"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EnergyBudget(**({"window_s": 1} | values))


def test_a_negative_cost_is_refused():
    purse = EnergyBudget(window_s=1, initial_j=1)
    for call in (purse.charge, purse.afford, purse.earn):
        with pytest.raises(ValueError, match="not negative"):
            call(-1)
    with pytest.raises(ValueError, match="needs the seconds"):
        purse.earn(0, 5)
    assert (purse.balance_j, purse.refused) == (1, 0)


def test_budget_and_gates_need_no_torch():
    command = "import sys, moe.service.budget, moe.service.gates; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
