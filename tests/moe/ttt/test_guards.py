"""Guards: what they must see, that they leave a sound run alone, and that a return is exact."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe import ttt
from moe.data.corruptions import corrupt
from moe.data.datasets import load_vision
from moe.data.pools import SamplePool
from moe.data.streams import StreamConfig, draw_shifts, play
from moe.model.config import model_config
from moe.model.transformer import MoEModel, initialise
from moe.model.variants import with_norm
from moe.training.evaluate import evaluate_vision
from moe.training.weights import load_model
from moe.ttt.guards import _spread

SETTINGS = ttt.Tent(learning_rate=1e-3)
QUICK = ttt.GuardSettings(
    concentration_limit=0.8, entropy_limit=0.2, average_decay=0.5, probation=3, warm_up=4
)


@pytest.fixture
def model() -> MoEModel:
    return initialise(MoEModel(model_config("vision", "tiny")), torch.Generator().manual_seed(0))


def images(seed: int, n: int = 16) -> Tensor:
    return torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def doubtful(seed: int, n: int = 16) -> Tensor:
    """Answers of all classes with entropy near its maximum."""
    return torch.randn(n, 10, generator=torch.Generator().manual_seed(seed)) / 10


def whole_state(model: MoEModel, state: ttt.AdaptationState) -> list[Tensor]:
    memory = [] if state.optimizer is None else state.optimizer.state_dict()["state"].values()
    buffers = [m["momentum_buffer"] for m in memory]
    return [tensor.clone() for tensor in [*model.state_dict().values(), *buffers, *state.averages.values()]]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def guarded(model: MoEModel, settings: ttt.GuardSettings = QUICK) -> tuple[ttt.Guard, ttt.AdaptationState]:
    state = ttt.start(model, SETTINGS)
    return ttt.Guard(model, state, settings), state


def run(guard: ttt.Guard, seeds: range) -> None:
    for seed in seeds:
        assert guard.step(ttt.tent, images(seed), doubtful(seed), SETTINGS) is not None


def test_a_sound_run_is_left_alone(model):
    guard, state = guarded(model)
    run(guard, range(20))
    assert guard.counters == ttt.GuardCounters(steps=20)
    watched = whole_state(model, state)
    state.reset(model)
    for seed in range(20):
        ttt.tent(model, state, images(seed), SETTINGS)
    assert same(whole_state(model, state), watched)


def test_a_collapse_to_one_class_is_undone_to_a_state_before_it_began(model):
    """Answers turn to class 3 with full entropy otherwise; the guard tells it by the moving shares alone."""
    guard, state = guarded(model)
    history = []
    for seed in range(10):
        run(guard, range(seed, seed + 1))
        history.append(whole_state(model, state))
    one_class = torch.zeros(16, 10)
    one_class[:, 3] = 0.1
    steps = 0
    while guard.step(ttt.tent, images(50 + steps), one_class, SETTINGS) is not None:
        steps += 1
        assert steps < QUICK.steps_to_tell
    assert steps >= 1
    assert guard.counters == ttt.GuardCounters(steps=10 + steps, collapsed=1, rollbacks=1)
    returned = whole_state(model, state)
    assert [i for i, old in enumerate(history) if same(old, returned)], (
        "not one of the states before the collapse"
    )


def test_a_guard_keeps_a_model_that_a_reckless_rate_would_ruin():
    """A learning rate a thousandfold too large on clean images of balanced classes; labels only score."""
    settings = ttt.Tent(learning_rate=20.0)
    limits = ttt.GuardSettings(concentration_limit=0.3, entropy_limit=0.01)
    clean, labels = load_vision("test", full=False)
    accuracy = {}
    for watched in (False, True):
        model = load_model("vision", "tiny", "cpu")
        state = ttt.start(model, settings, "last_block")
        guard = ttt.Guard(model, state, limits)
        generator = torch.Generator().manual_seed(0)
        for _ in range(40):
            batch = clean[torch.randint(len(clean) - 600, (64,), generator=generator)]
            if watched:
                with torch.no_grad():
                    answers = model(batch, 2).logits
                guard.step(ttt.tent, batch, answers, settings, 2)
            else:
                ttt.tent(model, state, batch, settings, 2)
        if watched:
            assert guard.counters.collapsed
            state.restore(model, guard.good)
        accuracy[watched] = evaluate_vision(model, clean[-600:], labels[-600:], top_k=2)
    assert accuracy[True] > accuracy[False] + 0.2


def test_answers_without_any_doubt_are_a_collapse_too(model):
    guard, state = guarded(model)
    fresh = whole_state(model, state)
    sure = torch.eye(10)[torch.arange(16) % 10] * 1e3  # all classes, evenly
    assert guard.step(ttt.tent, images(0), sure, SETTINGS) is None
    assert guard.counters == ttt.GuardCounters(collapsed=1, rollbacks=1)
    assert same(whole_state(model, state), fresh)


def step_without_loss(*args: Any) -> ttt.Step:
    raise ttt.AdaptationDiverged("no number")


def step_into_the_infinite(model: MoEModel, state: ttt.AdaptationState, *args: Any) -> ttt.Step:
    with torch.no_grad():
        state.parameters[-1][5] = math.inf
    return ttt.Step(selected=16)


@pytest.mark.parametrize(
    ("method", "answers"),
    [
        (step_without_loss, doubtful(9)),
        (step_into_the_infinite, doubtful(9)),
        (ttt.tent, doubtful(9) * math.nan),
    ],
    ids=["loss", "parameters", "answers"],
)
def test_numbers_that_are_not_finite_are_undone_exactly(model, method, answers):
    guard, state = guarded(model)
    run(guard, range(2))
    assert guard.step(method, images(9), answers, SETTINGS) is None
    assert guard.counters == ttt.GuardCounters(steps=2, non_finite=1, rollbacks=1)
    returned = whole_state(model, state)
    state.reset(model)  # two steps are less than the probation: the start is the last state known as good
    assert same(returned, whole_state(model, state))


def test_a_rollback_goes_to_the_newest_state_that_has_proven_itself(model):
    guard, state = guarded(model)
    history = []
    for seed in range(9):
        run(guard, range(seed, seed + 1))
        history.append(whole_state(model, state))
    assert guard.step(ttt.tent, images(9), doubtful(9) * math.nan, SETTINGS) is None
    # A state is noted after steps 0, 4 and 8, and has proven itself after three more.
    assert same(whole_state(model, state), history[4])


@pytest.mark.parametrize("poison", ["inputs", "entropy"])
def test_a_poisoned_batch_is_left_out(model, poison):
    guard, state = guarded(model)
    run(guard, range(6))
    before = whole_state(model, state)
    bad_images = images(7) // 4 if poison == "inputs" else images(7)
    bad_answers = doubtful(7) * 40 if poison == "entropy" else doubtful(7)
    assert guard.step(ttt.tent, bad_images, bad_answers, SETTINGS) is None
    assert guard.counters == ttt.GuardCounters(steps=6, poisoned=1)
    assert same(whole_state(model, state), before)
    run(guard, range(8, 10))


def test_inputs_that_stay_different_are_a_shift_and_no_poison(model):
    guard, _ = guarded(model)
    run(guard, range(6))
    taken = [guard.step(ttt.tent, images(s) // 4, doubtful(s), SETTINGS) is not None for s in range(6, 14)]
    assert taken == [False] * (QUICK.shift_after - 1) + [True] * (8 - QUICK.shift_after + 1)


def test_an_empty_selection_is_counted(model):
    settings = ttt.Eata()
    state = ttt.start(model, settings)
    guard = ttt.Guard(model, state, QUICK)
    before = whole_state(model, state)
    step = guard.step(ttt.eata, images(0), doubtful(0), settings)  # an untrained model is sure of nothing
    assert step == ttt.Step(selected=0)
    assert guard.counters == ttt.GuardCounters(empty=1)
    assert same(whole_state(model, state), before)


@pytest.mark.parametrize("settings", [QUICK, ttt.GuardSettings()])
def test_a_complete_collapse_is_told_within_the_probation(settings):
    share, entropy, steps = 0.0, 1.0, 0
    while share <= settings.concentration_limit or entropy >= settings.entropy_limit:
        share = settings.average_decay * share + (1 - settings.average_decay)
        entropy *= settings.average_decay
        steps += 1
    assert steps <= settings.steps_to_tell <= settings.probation


@pytest.mark.parametrize(
    "values",
    [
        {"probation": 2},
        {"average_decay": 1.0},
        {"outlier_z": math.nan},
        {"warm_up": 0},
        {"entropy_limit": 0.0},
    ],
)
def test_limits_that_mean_nothing_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ttt.GuardSettings(**values)


FAST = {"statistics_momentum": 0.5}  # three batches catch up with a shift, and with few classes
SHIPPED = {
    ttt.batch_statistics: ttt.BatchStatistics(**FAST),
    ttt.tent: ttt.Tent(**FAST),
    ttt.eata: ttt.Eata(**FAST),
    ttt.sar: ttt.Sar(**FAST),
}
every_method = pytest.mark.parametrize("method", SHIPPED, ids=lambda method: method.__name__)


@pytest.fixture(scope="module")
def pool() -> SamplePool:
    return SamplePool("vision", ("clean",), "cpu")


@pytest.fixture(scope="module")
def left_alone(pool) -> dict[str, float]:
    """Accuracy of the model that does not adapt, by schedule."""
    return {stream.schedule: accuracy(stream, pool, None, None) for stream in (FEW_CLASSES, SHIFTS)}


def accuracy(stream: StreamConfig, pool: SamplePool, method: Any, limits: ttt.GuardSettings | None) -> float:
    """Mean accuracy over a stream, each batch scored before it is learned from; None does not adapt."""
    model, right = load_model("vision", "tiny", "cpu"), []
    state = ttt.start(model, SHIPPED.get(method, ttt.BatchStatistics()))
    guard = None if limits is None else ttt.Guard(model, state, limits)
    for inputs, targets, _ in play(draw_shifts(stream, pool.targets[0], 0), pool):
        with torch.no_grad():
            output = model(inputs)
        right.append(float((output.predictions == targets).float().mean()))
        if guard is not None and method is not None:
            guard.step(method, inputs, output.logits, SHIPPED[method])
        elif method is not None:
            method(model, state, inputs, SHIPPED[method])
    return sum(right) / len(right)


FEW_CLASSES = StreamConfig(
    task="vision",
    kinds=("clean",),
    batches=24,
    batch_size=32,
    schedule="label_correlated",
    concentration=0.01,
)
SHIFTS = StreamConfig(task="vision", kinds=("brightness", "fog"), batches=12, batch_size=32)


@every_method
def test_a_guard_keeps_label_correlated_batches_from_doing_harm(pool, left_alone, method):
    """A batch is of one class or a few. What adapts without a guard fits itself to the last one."""
    before = left_alone["label_correlated"]
    assert accuracy(FEW_CLASSES, pool, method, ttt.GuardSettings()) > before - 0.02
    if method is ttt.batch_statistics:
        assert accuracy(FEW_CLASSES, pool, method, None) < before - 0.08


@every_method
def test_a_guard_leaves_the_recovery_under_a_shift(pool, left_alone, method):
    alone = accuracy(SHIFTS, pool, method, None)
    assert alone > left_alone["per_shift"] + 0.15
    assert accuracy(SHIFTS, pool, method, ttt.GuardSettings()) > alone - 0.05


def guarded_shipped(limits: ttt.GuardSettings) -> tuple[MoEModel, ttt.Guard, ttt.AdaptationState]:
    model = load_model("vision", "tiny", "cpu")
    state = ttt.start(model, SHIPPED[ttt.batch_statistics])
    return model, ttt.Guard(model, state, limits), state


def learn(model: MoEModel, guard: ttt.Guard, inputs: Tensor) -> ttt.Step | None:
    with torch.no_grad():
        answers = model(inputs).logits
    return guard.step(ttt.batch_statistics, inputs, answers, SHIPPED[ttt.batch_statistics])


def test_batches_of_one_class_are_left_out_until_they_make_up_a_mixture(pool):
    model, guard, state = guarded_shipped(ttt.GuardSettings(gather=10))
    before, images, labels = whole_state(model, state), pool.inputs[0], pool.targets[0]
    for label in range(9):
        assert learn(model, guard, images[labels == label][:32]) is None
    assert guard.counters == ttt.GuardCounters(concentrated=9)
    assert same(whole_state(model, state), before)
    step = learn(model, guard, images[labels == 9][:32])
    assert step == ttt.Step(selected=32)  # as large as a batch, of all ten
    assert guard.counters == ttt.GuardCounters(concentrated=10, steps=1)


@pytest.mark.parametrize("kind", ["brightness", "contrast", "fog", "pixelate"])
def test_few_classes_are_told_from_a_shift_under_which_the_model_names_few(pool, kind):
    model, guard, _ = guarded_shipped(ttt.GuardSettings(spread_limit=0.9))
    shifted = corrupt(pool.inputs[0][:64], kind, 5, torch.Generator().manual_seed(0))
    assert learn(model, guard, shifted) is not None


@pytest.mark.parametrize(
    ("before", "kind"), [("shot_noise", "pixelate"), ("impulse_noise", "rotation"), ("blur", "gamma")]
)
def test_a_shift_that_follows_another_is_not_taken_for_few_classes(pool, before, kind):
    """Against the statistics of another shift both signs speak for few classes."""
    model, guard, _ = guarded_shipped(ttt.GuardSettings(warm_up=99))  # no outliers
    noise = torch.Generator().manual_seed(0)
    batches = corrupt(pool.inputs[0][:384], before, 5, noise).split(64)
    for batch in (*batches, corrupt(pool.inputs[0][384:448], kind, 5, noise)):
        assert learn(model, guard, batch) is not None


@pytest.mark.parametrize("kind", ["clean", "elastic"])
def test_one_class_is_left_out_where_it_moves_the_first_norm_most(pool, kind):
    """Sandals among images that the bank knows: their first features are unlike those of all classes."""
    model, images = load_model("vision", "tiny", "cpu"), pool.inputs[0][:1500]
    shifted = images if kind == "clean" else corrupt(images, kind, 5, torch.Generator().manual_seed(0))
    adapter = ttt.Adapter(model, ttt.Bank(), guard=ttt.GuardSettings(warm_up=99))  # no outliers

    def taken(inputs: Tensor) -> int:
        with torch.no_grad():
            answers = model(inputs).logits
        return adapter.adapt(inputs, answers, 1)

    assert sum(taken(batch) for batch in shifted[:512].split(64)) == 8
    one_class = shifted[pool.targets[0][:1500] == 5][:128]
    assert taken(one_class) == 0 and adapter.counters.concentrated == 1
    assert taken(shifted[512:576]) == 1


def test_what_has_no_running_statistics_costs_no_second_look():
    model = initialise(
        MoEModel(with_norm(model_config("vision", "tiny"), "layer")), torch.Generator().manual_seed(0)
    )
    guard = ttt.Guard(model, ttt.start(model, SETTINGS), ttt.GuardSettings(spread_limit=0.99))
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    one_class = torch.eye(10)[torch.full((16,), 3)]
    assert guard.step(ttt.tent, images(0), one_class, SETTINGS) is not None
    assert len(passes) == 1
    assert guard.step(ttt.tent, images(0, n=1), one_class[:1], SETTINGS) is not None


@given(st.lists(st.integers(0, 9), min_size=1, max_size=200))
def test_the_spread_of_answers_is_a_share_and_grows_with_their_classes(predictions):
    counts = torch.bincount(torch.tensor(predictions), minlength=10).double()
    spread = float(_spread(counts / counts.sum(), len(predictions)))
    fewest = 1 / min(10, len(predictions))
    assert fewest * (1 - 1e-9) <= spread
    assert (spread < fewest * (1 + 1e-9)) == (len(set(predictions)) == 1)
    even = float(_spread(torch.full((10,), 0.1, dtype=torch.float64), 1000))
    assert even == pytest.approx(math.exp(9 / 2000))
