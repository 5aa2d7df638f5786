"""The data sets and the corruptions."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import lzma
import random
import subprocess
import sys
import tokenize
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.data import datasets as data
from moe.data.corruptions import KINDS, corrupt
from moe.data.datasets import VISION_CLASSES, data_digest, describe, load_language, load_vision
from moe.data.pools import SamplePool, text_of_shift
from moe.data.text import prose_and_code, source_files
from moe.errors import DataCorruptError, DataMissingError


@pytest.fixture
def no_full_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without the complete Fashion-MNIST."""
    monkeypatch.delenv("THERMALMOE_DATA", raising=False)
    monkeypatch.setattr(data, "SYSTEM_FULL_FOLDER", tmp_path / "nowhere")


@pytest.fixture
def own_subset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in place of the shipped subset's, empty."""
    monkeypatch.setattr(data, "SUBSET_FOLDER", tmp_path)
    data._read_subset.cache_clear()
    return tmp_path


def write_idx_folder(folder: Path, count: dict[str, int]) -> None:
    """Write four IDX files of random pixels, byte by byte from the format's description."""
    for prefix, n in count.items():
        pixels = random.Random(n).randbytes(n * 784)
        size = n.to_bytes(4, "big")
        images = b"\x00\x00\x08\x03" + size + b"\x00\x00\x00\x1c" * 2 + pixels
        labels = b"\x00\x00\x08\x01" + size + bytes(i % 10 for i in range(n))
        for name, raw in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(raw, 1))


@pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 5_000)])
def test_shipped_subset_is_balanced(split: data.Split, count: int) -> None:
    images, labels = load_vision(split, full=False)
    assert images.shape == (count, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [count // 10] * len(VISION_CLASSES)
    assert labels[:100].unique().numel() == 10  # a prefix is a usable sample: not sorted by class


def test_subset_splits_share_no_image() -> None:
    train, test = (load_vision(split, full=False)[0].flatten(1) for split in ("train", "test"))
    assert not {row.tobytes() for row in train.numpy()} & {row.tobytes() for row in test.numpy()}


def test_validation_is_the_end_of_train_as_long_as_test() -> None:
    (images, labels), train = (load_vision(split, full=False) for split in ("validation", "train"))
    assert torch.equal(images, train[0][5_000:]) and torch.equal(labels, train[1][5_000:])
    for domain in ("prose", "code"):
        part, whole, test = (load_language(domain, split) for split in ("validation", "train", "test"))
        assert len(part) == len(test) and torch.equal(part, whole[-len(test) :])
    pool = SamplePool("language", ("code",), "cpu", "validation")
    assert bytes(pool.inputs[0, -1]) in bytes(part) and bytes(pool.inputs[0, -1]) not in bytes(test)
    pool = SamplePool("vision", ("clean", "contrast@3"), "cpu", "validation")
    assert torch.equal(pool.inputs[0], load_vision("validation")[0]) and len(pool) == len(pool.inputs[1])
    with pytest.raises(ValueError, match="split must be one of"):
        text_of_shift("clean", "holdout")  # pyright: ignore[reportArgumentType]


def test_subset_is_cut_from_the_official_splits() -> None:
    if data.full_vision_folder() is None:
        pytest.skip("the complete Fashion-MNIST is not installed")
    for split in ("train", "test"):
        full_images, full_labels = load_vision(split, full=True)
        label_of = {row.tobytes(): int(y) for row, y in zip(full_images.numpy(), full_labels, strict=True)}
        images, labels = load_vision(split, full=False)
        assert [label_of[row.tobytes()] for row in images.numpy()] == labels.tolist()


@pytest.mark.usefixtures("no_full_set")
def test_without_the_full_set_the_subset_is_used_unless_full_is_demanded() -> None:
    assert len(load_vision("train")[0]) == 10_000
    assert describe("vision")["source"] == "Fashion-MNIST, shipped subset"
    with pytest.raises(DataMissingError, match="dataset-fashion-mnist"):
        load_vision("train", full=True)


def test_full_set_is_found_by_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THERMALMOE_DATA", str(tmp_path))
    with pytest.raises(DataMissingError, match="THERMALMOE_DATA"):
        load_vision("test")
    write_idx_folder(tmp_path, {"train": 30, "t10k": 20})
    for path in tmp_path.iterdir():
        monkeypatch.setitem(
            data.SHA256, path.name, hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        )
    images, labels = load_vision("test")
    assert images.shape == (20, 28, 28) and images.numpy().tobytes() == random.Random(20).randbytes(20 * 784)
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert describe("vision")["source"] == "Fashion-MNIST, complete"
    assert len(load_vision("test", full=False)[0]) == 5_000


@pytest.mark.parametrize("damage", ["another set", "cut", "not gzip"])
def test_damaged_full_set_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    monkeypatch.setenv("THERMALMOE_DATA", str(tmp_path))
    write_idx_folder(tmp_path, {"train": 10, "t10k": 10_000})
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    if damage != "another set":
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"hello")
    with pytest.raises(DataCorruptError, match="t10k-images"):
        load_vision("test")


def test_damaged_subset_is_refused(own_subset: Path) -> None:
    with pytest.raises(DataMissingError, match=r"test\.xz"):
        load_vision("test", full=False)
    (own_subset / "test.xz").write_bytes(b"hello")
    with pytest.raises(DataCorruptError, match="xz"):
        load_vision("test", full=False)
    (own_subset / "test.xz").write_bytes(
        lzma.compress(bytes(5_000 * 785), preset=0)
    )  # right size, wrong content
    with pytest.raises(DataCorruptError, match="SHA-256"):
        load_vision("test", full=False)


def test_loaded_tensors_are_the_callers_own() -> None:
    images, labels = load_vision("test", full=False)
    images.zero_()
    labels.zero_()
    text = load_language("prose", "test").zero_()
    assert load_vision("test", full=False)[0].any() and load_vision("test", full=False)[1].any()
    assert load_language("prose", "test").shape == text.shape and load_language("prose", "test").any()


def test_language_is_utf8_prose_and_code() -> None:
    prose, code = (bytes(load_language(domain, "train").numpy()).decode() for domain in ("prose", "code"))
    assert len(prose) > 1_000_000 and len(code) > 2_000_000
    assert prose.count("the ") / len(prose) > 10 * code.count("the ") / len(code)
    assert code.count("def ") / len(code) > 10 * prose.count("def ") / len(prose)
    for domain in ("prose", "code"):
        assert 10_000 < load_language(domain, "test").numel() <= 2**18


def test_code_is_the_source_without_docstrings_and_comments() -> None:
    sources = source_files()
    for name in random.Random(0).sample(sorted(sources), 25):
        tree = ast.parse(sources[name])
        _, code = prose_and_code(sources[name])
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
        assert ast.unparse(ast.parse(code)) == ast.unparse(tree), name
        kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(code).readline)}
        assert tokenize.COMMENT not in kinds, name


@pytest.mark.parametrize(
    ("source", "prose", "code"),
    [
        ('"""Doc."""\nx = "#no"  # yes\n', "Doc.\n\n", 'x = "#no"\n'),
        ("def f(): 'doc'\n", "doc\n\n", "def f(): pass\n"),
        (
            "class C:\n    '''é\n    b'''\n    # alone\n    y = '''#no'''\n",
            "é\nb\n\n",
            "class C:\n    y = '''#no'''\n",
        ),
        ("x = 1\n\n\n\n\n\n\ny = r'\\'' # it's\n", "", "x = 1\n\n\ny = r'\\''\n"),
    ],
)
def test_prose_and_code_of_small_sources(source: str, prose: str, code: str) -> None:
    assert prose_and_code(source) == (prose, code)


def test_data_is_the_same_in_another_process() -> None:
    command = "from moe.data.datasets import data_digest as d; print(d('vision', full=False), d('language'))"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert other.split() == [data_digest("vision", full=False), data_digest("language")]
    assert describe("language")["sha256"] == data_digest("language") != data_digest("vision", full=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda: load_vision("valid"),  # pyright: ignore[reportArgumentType]
        lambda: load_language("poems", "train"),  # pyright: ignore[reportArgumentType]
        lambda: load_language("prose", "valid"),  # pyright: ignore[reportArgumentType]
        lambda: data_digest("audio"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_unknown_names_are_refused(call) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        call()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return load_vision("test", full=False)[0][:64]


@pytest.mark.parametrize("kind", KINDS)
def test_corruption_repeats_and_grows_with_severity(kind: str, images: torch.Tensor) -> None:
    before, distortion = images.clone(), []
    for severity in range(1, 6):
        first, second = (corrupt(images, kind, severity, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)
        assert first.dtype == torch.uint8 and first.shape == images.shape
        distortion.append((first.float() - images.float()).square().mean().item())
    assert torch.equal(images, before)
    assert all(milder < worse for milder, worse in pairwise([0, *distortion]))


RANDOM_KINDS = (
    "gaussian_noise", "shot_noise", "rotation", "occlusion", "impulse_noise", "motion_blur", "elastic", "fog",
    "dead_lines",
)  # fmt: skip


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_random_corruptions_follow_the_generator(kind: str, images: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    assert not torch.equal(corrupt(images, kind, 3, generator), corrupt(images, kind, 3, generator))


@given(kind=st.sampled_from(KINDS), severity=st.integers(1, 5), level=st.integers(0, 255))
@settings(max_examples=40)
def test_extreme_images_stay_in_range(kind: str, severity: int, level: int) -> None:
    flat = torch.full((2, 28, 28), level, dtype=torch.uint8)
    result = corrupt(flat, kind, severity, torch.Generator().manual_seed(0))
    if kind in (
        "blur",
        "contrast",
        "pixelate",
        "defocus",
        "motion_blur",
        "elastic",
    ):  # averages: nothing to change in a uniform image
        assert (result.int() - level).abs().max() <= 1
    if kind == "brightness":
        assert (result >= level).all()


def test_rotation_by_the_stated_angle() -> None:
    line = torch.zeros(1, 28, 28, dtype=torch.uint8)
    line[0, 13:15, 2:26] = 255  # horizontal bar
    turned = corrupt(line, "rotation", 5, torch.Generator().manual_seed(0))[0].double()
    rows, columns = torch.meshgrid(torch.arange(28.0) - 13.5, torch.arange(28.0) - 13.5, indexing="ij")
    points = torch.stack([rows.flatten(), columns.flatten()]).double()
    axis = torch.linalg.eigh((turned.flatten() * points) @ points.T).eigenvectors[
        :, -1
    ]  # principal axis of the mass
    angle = torch.rad2deg(torch.atan(axis[0] / axis[1])).abs().item()
    assert angle == pytest.approx(40, abs=1)


def test_occlusion_covers_one_grey_square() -> None:
    covered = corrupt(
        torch.zeros(100, 28, 28, dtype=torch.uint8), "occlusion", 1, torch.Generator().manual_seed(0)
    )
    assert (covered.flatten(1) == 128).sum(1).eq(36).all()


def test_corrupting_refuses_what_it_does_not_know(images: torch.Tensor) -> None:
    generator = torch.Generator()
    for severity in (0, 6, 1.5):
        with pytest.raises(ValueError, match="severity"):
            corrupt(images, "blur", severity, generator)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="gaussian_noise"):
        corrupt(images, "snow", 1, generator)
    with pytest.raises(ValueError, match="uint8"):
        corrupt(images.float(), "blur", 1, generator)
    with pytest.raises(ValueError, match="28"):
        corrupt(images[:, :14], "blur", 1, generator)


def test_the_kinds_that_profiles_were_measured_with_are_as_they_were(images: torch.Tensor) -> None:
    """Mean squared distortion at severities 1 and 5, written down before further kinds came."""
    written = {
        "gaussian_noise": (451.220, 7766.887),
        "shot_noise": (832.907, 8604.097),
        "blur": (414.951, 2410.795),
        "contrast": (423.513, 4348.832),
        "brightness": (389.979, 8502.407),
        "pixelate": (1035.561, 3477.092),
        "rotation": (2031.635, 7250.558),
        "occlusion": (468.691, 2973.391),
    }
    assert KINDS[:8] == tuple(written)
    for kind, distortions in written.items():
        for severity, distortion in zip((1, 5), distortions, strict=True):
            changed = corrupt(images, kind, severity, torch.Generator().manual_seed(3))
            error = (changed.float() - images.float()).square().mean().item()
            assert error == pytest.approx(distortion, rel=1e-4), kind


def test_impulse_noise_changes_the_stated_share_to_black_and_white() -> None:
    grey = torch.full((200, 28, 28), 100, dtype=torch.uint8)
    for severity, share in enumerate((0.05, 0.1, 0.2, 0.3, 0.45), 1):
        noisy = corrupt(grey, "impulse_noise", severity, torch.Generator().manual_seed(0))
        for level in (0, 255):
            assert (noisy == level).float().mean().item() == pytest.approx(share / 2, rel=0.03)
        assert ((noisy == 100) | (noisy == 0) | (noisy == 255)).all()


def test_dead_lines_are_whole_rows_of_the_stated_number() -> None:
    grey = torch.full((100, 28, 28), 100, dtype=torch.uint8)
    dead = corrupt(grey, "dead_lines", 5, torch.Generator().manual_seed(0)) != 100
    assert (dead.all(2) == dead.any(2)).all()
    assert dead.all(2).sum(1).eq(14).all()


@pytest.mark.parametrize("kind", ["defocus", "motion_blur"])
def test_blurs_spread_a_point_over_their_shape_and_keep_its_light(kind: str) -> None:
    point = torch.zeros(50, 28, 28, dtype=torch.uint8)
    point[:, 13:16, 13:16] = 255  # one pixel would be rounded away
    spread = corrupt(point, kind, 3, torch.Generator().manual_seed(0)).double()
    assert spread.sum((1, 2)).numpy() == pytest.approx(9 * 255, rel=0.03)
    offset = torch.arange(28.0, dtype=torch.float64) - 14
    places = torch.stack(torch.meshgrid(offset, offset, indexing="ij")).flatten(1)  # [2, 784]
    share = spread.flatten(1) / spread.sum((1, 2))[:, None]
    spreads = torch.linalg.eigvalsh(torch.einsum("bp,ip,jp->bij", share, places, places))  # variances, [B, 2]
    own = (3**2 - 1) / 12  # of the point itself
    if kind == "defocus":  # a disc of radius r has the variance r^2 / 4 along any axis
        assert (spreads - own).numpy() == pytest.approx(2.4**2 / 4, rel=0.15)
    else:  # a line of length l has l^2 / 12 along itself, none across
        assert (spreads[:, 1] - own).numpy() == pytest.approx(8**2 / 12, rel=0.15)
        assert (spreads[:, 0] - own).numpy() == pytest.approx(0, abs=0.3)


def test_elastic_displaces_by_the_stated_pixels_at_most() -> None:
    """Of a ramp: what a pixel reads tells where it was read."""
    ramp = (8 * torch.arange(28)).to(torch.uint8).expand(64, 28, 28)
    bent = corrupt(ramp, "elastic", 3, torch.Generator().manual_seed(0))
    moved = (bent.double() - ramp.double()).abs() / 8
    assert 2.5 < moved.max().item() <= 3.1
    assert (bent[:, :, 1:].int() - bent[:, :, :-1].int()).abs().max() < 8 * 3  # no tears


@given(level=st.integers(0, 255), severity=st.integers(1, 5))
def test_solarize_and_gamma_are_curves_of_the_brightness(level: int, severity: int) -> None:
    flat = torch.full((1, 28, 28), level, dtype=torch.uint8)
    threshold = (0.9, 0.8, 0.7, 0.6, 0.5)[severity - 1]
    exponent = (1.5, 2, 3, 4.5, 7)[severity - 1]
    solarized, dark = (corrupt(flat, kind, severity, torch.Generator()) for kind in ("solarize", "gamma"))
    assert solarized.unique().tolist() == [255 - level if level / 255 > threshold else level]
    assert dark.unique().tolist() == pytest.approx([255 * (level / 255) ** exponent], abs=0.51)


def test_fog_mixes_with_a_haze_of_full_range() -> None:
    """On black, the haze alone is seen, on white, what it takes of the light."""
    for level in (0, 255):
        flat = torch.full((20, 28, 28), level, dtype=torch.uint8)
        foggy = corrupt(flat, "fog", 3, torch.Generator().manual_seed(0)).float()
        assert foggy.amin((1, 2)).tolist() == pytest.approx([level / 2] * 20, abs=1)
        assert foggy.amax((1, 2)).tolist() == pytest.approx([(level + 255) / 2] * 20, abs=1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_corruption_on_a_gpu_agrees_with_the_cpu(kind: str, images: torch.Tensor) -> None:
    on_cpu = corrupt(images, kind, 4, torch.Generator().manual_seed(3))
    on_gpu = corrupt(images.cuda(), kind, 4, torch.Generator().manual_seed(3))
    difference = (on_gpu.cpu().int() - on_cpu.int()).abs()
    assert on_gpu.is_cuda and difference.float().mean() < 0.05
