"""Arrays and archives are whole or refused by name, wherever they were cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataCorruptError
from moe.files import read_array, read_json


def test_a_cut_array_is_refused_by_name(tmp_path: Path) -> None:
    file, array = tmp_path / "ids.npy", np.arange(100)
    np.save(file, array)
    whole = file.read_bytes()
    assert np.array_equal(read_array(file, "make it again"), array)
    for cut in (0, 1, 7, 50, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataCorruptError, match=rf"{file} is no whole NumPy array .*: make it again"):
            read_array(file, "make it again")
    np.save(file, np.array([print]), allow_pickle=True)  # code, which is never run
    with pytest.raises(DataCorruptError, match="make it again"):
        read_array(file, "make it again")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b'"text"', b'{"b": 1}'])
def test_what_is_no_object_with_its_keys_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    file.write_bytes(content)
    with pytest.raises(DataCorruptError, match=rf"{file} .*: make it again"):
        read_json(file, "make it again", ("a",))
    file.write_text('{"a": 1, "b": 2}')
    assert read_json(file, "make it again", ("a",)) == {"a": 1, "b": 2}
