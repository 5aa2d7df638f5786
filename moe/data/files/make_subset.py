"""Cut the shipped subset from the complete Fashion-MNIST: ``python -m moe.data.files.make_subset``.

Of every class the first 1,000 images of the official train split and the first 500 of the official test
split, in their official order. A file is the images' bytes, then the labels' bytes, compressed as xz.
"""

from __future__ import annotations

import hashlib
import lzma

import torch
import tyro

from moe.data.datasets import SUBSET_FOLDER, SUBSET_SIZE, VISION_CLASSES, load_vision
from moe.errors import one_line_errors


def main() -> None:
    """Write both files into the package and print the digests that `moe.data.datasets` must hold."""
    for split in SUBSET_SIZE:
        images, labels = load_vision(split, full=True)
        per_class = SUBSET_SIZE[split] // len(VISION_CLASSES)
        chosen = torch.cat([torch.nonzero(labels == c)[:per_class, 0] for c in range(len(VISION_CLASSES))])
        chosen = chosen.sort().values
        raw = images[chosen].numpy().tobytes() + labels[chosen].to(torch.uint8).numpy().tobytes()
        path = SUBSET_FOLDER / f"{split}.xz"
        path.write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
        print(f"{path}: {path.stat().st_size} bytes, unpacked SHA-256 {hashlib.sha256(raw).hexdigest()}")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
