"""What compiled code shares: how it is compiled and kept, and loops that are slow to compile as slices.

Compiled code is kept on disk by numba: in `__pycache__` beside the source, in the folder that
`NUMBA_CACHE_DIR` names, or, where the sources cannot be written to, in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    UserWideCacheLocator,
)
from numba.core.serialize import dumps

_LOG = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = "moe", "thermoe_env"
_NO_FILE = uuid.uuid4().hex


@cache
def _sources() -> bytes:
    """Digest of all sources that may be compiled together or hold a constant that compiled code froze."""
    return _digest([path for package in _PACKAGES for path in (_ROOT / package).rglob("[!.]*.py")])


def _digest(paths: list[Path]) -> bytes:
    """Digest of files and their names, the same wherever the product lies."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.digest()


@cache
def _stamp(folder: str) -> str:
    """What the code compiled from a file in `folder` depends on, as a short text that names its version."""
    own = _digest([*Path(folder).glob("[!.]*.py")])
    versions = f"{numba.__version__} {np.__version__}".encode()
    return hashlib.sha256(_sources() + own + versions).hexdigest()[:16]


def _stamp_of(definition: Any) -> str:
    """`_stamp` of where a function or class is defined; if that is no file, one that no later process has."""
    try:
        return _stamp(os.path.dirname(inspect.getfile(definition)))
    except (OSError, TypeError):
        return _NO_FILE


@cache
def _warn(reason: str) -> None:
    """Say once why the next start compiles again."""
    _LOG.warning(
        "compiled code may be lost after this run, and compiling it takes seconds to minutes: %s; "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        reason,
    )


@cache
def _temporary_folder() -> Path:
    """A folder below the system's for temporary files, and of this user alone: what lies in it is run."""
    user = os.getuid() if hasattr(os, "getuid") else None  # on Windows the system's is the user's own
    folder = Path(tempfile.gettempdir(), f"thermalmoe-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if user is not None and folder.lstat().st_uid != user:
        raise PermissionError(f"{folder} belongs to another user")
    return folder


class _TemporaryLocator(UserWideCacheLocator):
    """The last resort of where to keep compiled code."""

    def ensure_cache_path(self) -> None:
        folder = _temporary_folder()
        self._cache_path = str(folder / self.get_suitable_cache_subpath(self._py_file))
        super().ensure_cache_path()
        _warn(f"only {folder} can be written")


class _Files(IndexDataCacheFile):
    """Code of all signatures of a function, and their index."""

    def _data_name(self, number: int) -> str:
        # Numbered alone, the code of two signatures that two processes keep at once would get one name.
        return super()._data_name(number).replace(".nbc", f".{uuid.uuid4().hex[:16]}.nbc")


class _Implementation(CompileResultCacheImpl):
    _locator_classes = [*CompileResultCacheImpl._locator_classes, _TemporaryLocator]  # noqa: RUF012


def _classes(kinds: Iterable[Any]) -> list[type]:
    """Classes of the named tuples among types, and in those that others hold."""
    found: list[type] = []
    for kind in kinds:
        if isinstance(kind, types.NamedTuple | types.NamedUniTuple):
            found.append(kind.instance_class)
        if isinstance(kind, types.Type):
            found += _classes(getattr(kind, "types", ()))
    return found


class _Cache(FunctionCache):
    """numba's cache of a function, but fresh only as long as all sources are.

    numba goes by the file of the function alone, while the code it keeps has in it that of every function
    called and every constant read, whatever file they are of.
    """

    _impl_class = _Implementation

    def __init__(self, py_func: Callable[..., Any]) -> None:
        super().__init__(py_func)
        self._stamp = _stamp_of(py_func)
        # In the files' names too: processes of two versions never read and write the same.
        name = f"{self._impl.filename_base}.{self._stamp}"
        self._cache_file = _Files(self._cache_path, name, self._stamp)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """With the sources of named tuples handed over: by their class, code of any package may be chosen.

        And with types that a function closes over by what they say. numba goes by their pickles, in which a
        type has a number that depends on how many were made before it: the next process would compile again.
        """
        cells = [cell.cell_contents for cell in self._py_func.__closure__ or ()]
        closed = [str(cell) if isinstance(cell, types.Type) else dumps(cell) for cell in cells]
        classes = [
            (_stamp_of(of), of.__module__, of.__qualname__, getattr(of, "_fields", ()))
            for of in _classes((*sig, *cells))
        ]
        return sig, codegen.magic_tuple(), self._py_func.__code__.co_code, *closed, *classes

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function and remove what was kept of it for other sources."""
        try:
            super().save_overload(sig, data)
            function = self._impl.filename_base.rpartition("-")[0]  # without its line
            for path in Path(self._cache_path).glob(f"{function}-*.nb[ci]"):
                if self._stamp not in path.name:
                    path.unlink(missing_ok=True)
        except OSError as error:
            _warn(error.strerror or str(error))


def compiler(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function at its first call and keeps the code as long as no source changes.

    Args:
        options: of `numba.njit`, beside those that all compiled code here has.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled: Any = numba.njit(nogil=True, error_model="numpy", **options)(function)
        try:
            compiled._cache = _Cache(function)
        except RuntimeError:  # of numba, which went through all folders
            _warn("no folder can be written")
        return compiled

    return decorate


jit = compiler()
inner = compiler(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For functions that only compiled code calls: without what would let Python call them, which for small ones
takes as long to compile as they do."""
inlined = compiler(inline="always")
"""For functions of the hottest loops that are called once or twice: a call that hands over arrays costs more
than they do. Each call is compiled anew."""
small = compiler(forceinline=True)
"""For those that are called at many places: compiled once and then inlined."""
parallel = compiler(parallel=True)
"""For functions with a `numba.prange` whose turns may run at once."""


@inlined
def fill(row, value):
    """Set every entry (a slice takes seconds to compile, for the sake of its errors)."""
    for i in range(row.shape[0]):
        row[i] = value


@inlined
def copy_row(row, source):
    """Copy one row into another of the same length."""
    for i in range(row.shape[0]):
        row[i] = source[i]
