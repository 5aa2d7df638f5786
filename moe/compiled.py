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
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    UserWideCacheLocator,
)
from numba.extending import intrinsic as _untyped_intrinsic

intrinsic: Any = _untyped_intrinsic  # the function that it makes has one argument less
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
        """With the sources of named tuples handed over: by their class, code of any package may be chosen."""
        classes = [
            kind.instance_class for kind in sig if isinstance(kind, types.NamedTuple | types.NamedUniTuple)
        ]
        return *super()._index_key(sig, codegen), *map(_stamp_of, classes)

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
"""For small functions of the hottest loops: a call that hands over arrays costs more than they do."""
parallel = compiler(parallel=True)
"""For functions with a `numba.prange` whose turns may run at once."""


@intrinsic
def uncounted(typing: Any, value: Any) -> Any:
    """An array, or a tuple of arrays, whose references nobody counts.

    Each count is an atomic operation on memory that threads share, and every look into a tuple and every row
    of an array is one or two. Only for as long as the caller holds what was handed over.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_owner(context, builder, value, arguments[0])

    return value(value), build


def _without_owner(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """`value` with no owner where it is an array, and likewise what a tuple holds."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        kinds: Any = kind
        parts = [
            _without_owner(context, builder, part, builder.extract_value(value, i))
            for i, part in enumerate(kinds)
        ]
        return context.make_tuple(builder, kind, parts)
    return value


@intrinsic
def _store(typing: Any, address: Any, value: Any) -> Any:
    """Write a value to memory as compiled code has it; returns how many bytes it takes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        form = context.get_value_type(value)
        at = builder.inttoptr(arguments[0], ir.PointerType(form))
        with builder.if_then(cgutils.is_not_null(builder, arguments[0])):
            builder.store(_without_owner(context, builder, value, arguments[1]), at)
        return context.get_constant(types.intp, context.get_abi_sizeof(form))

    return types.intp(types.intp, value), build


@jit
def _stored(address, value):
    return _store(address, value)


class Held:
    """Arrays that compiled code finds by one address: each that Python hands over takes time to take apart.

    Attributes:
        address: What `held` takes.
        kind: Their type, likewise.
    """

    def __init__(self, value: tuple[Any, ...]) -> None:
        """Keep a tuple, whose arrays stay where they are."""
        self._value, self.kind = value, numba.typeof(value)
        self._memory = np.zeros(_stored(0, value), np.uint8)
        self.address = self._memory.ctypes.data
        _stored(self.address, value)


@intrinsic
def held(typing: Any, address: Any, kind: Any) -> Any:
    """What a `Held` keeps, uncounted, by its address and its type, which is a constant of the caller's."""
    value = kind.instance_type

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.inttoptr(arguments[0], ir.PointerType(context.get_value_type(value)))
        return builder.load(at)

    return value(types.intp, kind), build


def address_of(function: Any, *arguments: Any) -> int:
    """Where the code of a compiled function for arguments like these is, for `call`; compiled if need be."""
    kinds = tuple(numba.typeof(argument) for argument in arguments)
    function.compile(kinds)
    compiled = function.overloads[kinds]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


@intrinsic
def call(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a function that returns nothing by its address (`address_of`), with a tuple of arguments.

    Numba takes what is called by its name into the caller and optimizes it there once more, which for large
    functions takes most of the time to compile.
    """
    kinds = tuple(arguments)

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        convention = context.call_conv
        function = builder.inttoptr(
            values[0], ir.PointerType(convention.get_function_type(types.none, kinds))
        )
        parts = [builder.extract_value(values[1], i) for i in range(len(kinds))]
        status, _ = convention.call_function(builder, function, types.none, kinds, parts)
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.none(address, arguments), build


_LINE_BYTES = 64


@intrinsic
def prefetch(typing: Any, arrays: Any, i: Any) -> Any:
    """Have the processor bring row `i` of each array of a tuple while something else is computed.

    Rows of many arrays at once are more streams than it foresees, and waiting for memory that is not near
    takes as long as hundreds of operations.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, row = arguments
        address, word = context.get_value_type(types.intp), ir.IntType(32)
        pointer = ir.PointerType(ir.IntType(8))
        ask = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), (pointer, word, word, word)), "llvm.prefetch.p0i8"
        )
        write, near, data = word(1), word(3), word(1)
        for number, kind in enumerate(arrays):
            array = context.make_array(kind)(context, builder, builder.extract_value(value, number))
            length = builder.extract_value(array.strides, 0)
            begin = builder.add(builder.ptrtoint(array.data, address), builder.mul(row, length))
            last = builder.add(begin, length)
            with cgutils.for_range_slice(builder, begin, last, address(_LINE_BYTES)) as (at, _):
                builder.call(ask, (builder.inttoptr(at, pointer), write, near, data))
        return context.get_dummy_value()

    return types.void(arrays, types.intp), build


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
