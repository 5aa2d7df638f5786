"""Memory that compiled code finds by an address, and code that it calls by one.

A function that takes many arrays hands each over as half a dozen numbers, and numba takes what is called by
its name into the caller and optimizes it there once more. By addresses a call is as cheap as its work, and
each function is compiled once, whoever calls it.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, lower_getattr_generic, models, register_model
from numba.extending import intrinsic as _untyped_intrinsic
from numba.np.arrayobj import populate_array

intrinsic: Any = _untyped_intrinsic  # the function that it makes has one argument less
_BYTE = ir.IntType(8)
_WORD = ir.IntType(64)


class Lent(types.Type):
    """Type of what a `Held` keeps: each of its fields is read from memory where it is named."""

    def __init__(self, kind: Any) -> None:
        """The type of a named tuple."""
        self.kind = kind
        # Short: it becomes part of the names of functions.
        super().__init__(f"Lent{hashlib.sha256(str(kind).encode()).hexdigest()[:16]}")

    @property
    def key(self) -> Any:
        """What makes two of them the same."""
        return self.kind

    @property
    def types(self) -> tuple[Any, ...]:
        """What it is made of, as numba's own types of tuples have it."""
        return (self.kind,)


register_model(Lent)(models.OpaqueModel)


@infer_getattr
class _Fields(AttributeTemplate):
    key = Lent

    def generic_resolve(self, lent: Lent, name: str) -> Any:
        """Type of a field; of a tuple in it, another `Lent`."""
        if name not in lent.kind.fields:
            return None
        part = lent.kind.types[lent.kind.fields.index(name)]
        return Lent(part) if isinstance(part, types.BaseNamedTuple) else part


@lower_getattr_generic(Lent)
def _read(context: Any, builder: Any, lent: Lent, value: Any, name: str) -> Any:
    """Where a tuple in it lies, or the value of any other field; arrays have no owner."""
    number = lent.kind.fields.index(name)
    part = lent.kind.types[number]
    before = [context.get_value_type(other) for other in lent.kind.types[:number]]
    at = builder.gep(value, [_WORD(_size(context, before))])
    if isinstance(part, types.BaseNamedTuple):
        return at
    if not isinstance(part, types.Array):
        return _constant(builder, at, context.get_value_type(part))
    array = context.make_array(part)(context, builder)
    forms = context.get_value_type(part).elements
    for place, member in enumerate(array._datamodel._fields):
        begin = builder.gep(at, [_WORD(_size(context, forms[:place]))])
        owns = member in ("meminfo", "parent")
        form = forms[place]
        setattr(array, member, cgutils.get_null_value(form) if owns else _constant(builder, begin, form))
    return array._getvalue()


def _size(context: Any, forms: Any) -> int:
    """Bytes of values one after the other: whole words, so nothing lies between them."""
    return sum(context.get_abi_sizeof(form) for form in forms)


def _constant(builder: Any, at: Any, form: Any) -> Any:
    """Read what nobody changes while compiled code runs."""
    value = builder.load(builder.bitcast(at, ir.PointerType(form)))
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


class Held:
    """A named tuple of arrays, numbers and more such tuples that compiled code finds by one address.

    Attributes:
        address: What `held` takes.
        kind: Their type, likewise.
    """

    def __init__(self, value: Any) -> None:
        """Keep a tuple, whose arrays stay where they are."""
        self.kind = numba.typeof(value)
        self._memory = np.zeros(len(_words(value)), np.int64)
        self.address = self._memory.ctypes.data
        self.hold(value)

    def hold(self, value: Any) -> None:
        """Keep another tuple of the same type in its place."""
        self._value = value
        self._memory[:] = _words(value)


def _words(value: Any) -> list[int]:
    """Memory of a value as compiled code has it, 8 bytes each; of an array: owner, parent, where it lies."""
    if isinstance(value, np.ndarray):
        place = value.__array_interface__["data"][0]
        return [0, 0, value.size, value.itemsize, place, *value.shape, *value.strides]
    if isinstance(value, tuple):
        return [word for part in value for word in _words(part)]
    return [value if isinstance(value, int) else int(np.float64(value).view(np.int64))]


@intrinsic
def held(typing: Any, address: Any, kind: Any) -> Any:
    """What a `Held` keeps, by its address and its type, which is a constant of the caller's."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.PointerType(_BYTE))

    return Lent(kind.instance_type)(types.intp, kind), build


@intrinsic
def place_of(typing: Any, lent: Any) -> Any:
    """The address of what was lent."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], _WORD)

    return types.intp(lent), build


@intrinsic
def numbers(typing: Any, record: Any) -> Any:
    """The memory of a record of numbers of one type, 8 bytes each, as an array.  # [fields]."""
    first = record.typeof(next(iter(record.fields)))
    kind = types.Array(first.dtype if isinstance(first, types.NestedArray) else first, 1, "C")

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(kind)(context, builder)
        count = context.get_constant(types.intp, record.size // 8)
        eight = context.get_constant(types.intp, 8)
        data = builder.bitcast(arguments[0], array.data.type)
        populate_array(array, data, [count], [eight], eight, meminfo=None)
        return array._getvalue()

    return kind(record), build


def address_of(function: Any, *arguments: Any) -> int:
    """Where the code of a compiled function for arguments like these is, for `call`; compiled if need be."""
    kinds = tuple(numba.typeof(argument) for argument in arguments)
    function.compile(kinds)
    compiled = function.overloads[kinds]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


@intrinsic
def call(typing: Any, address: Any, arguments: Any, result: Any) -> Any:
    """Call a function by its address (`address_of`) with a tuple of arguments; `result` is its type."""
    kinds, returned = tuple(arguments), result.instance_type

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        convention = context.call_conv
        function = builder.inttoptr(values[0], ir.PointerType(convention.get_function_type(returned, kinds)))
        parts = [builder.extract_value(values[1], i) for i in range(len(kinds))]
        status, value = convention.call_function(builder, function, returned, kinds, parts)
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return value

    return returned(address, arguments, result), build


@intrinsic
def take(typing: Any, counter: Any, amount: Any) -> Any:
    """Add to the first entry of an int64 array at once, whoever else does, and return what it was."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(counter)(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, arguments[1], "monotonic")

    return types.int64(counter, types.int64), build


_LINE_BYTES = 64


@intrinsic
def prefetch(typing: Any, arrays: Any, i: Any) -> Any:
    """Have the processor bring row `i` of each array of a tuple while something else is computed.

    Rows of many arrays at once are more streams than it foresees, and waiting for memory that is not near
    takes as long as hundreds of operations.
    """
    lent = isinstance(arrays, Lent)
    kinds = arrays.kind.types if lent else tuple(arrays)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, row = arguments
        for number, kind in enumerate(kinds):
            if lent:
                part = _read(context, builder, arrays, value, arrays.kind.fields[number])
            else:
                part = builder.extract_value(value, number)
            _ask_for(context, builder, kind, context.make_array(kind)(context, builder, part), row)
        return context.get_dummy_value()

    return types.void(arrays, types.intp), build


def _ask_for(context: Any, builder: Any, kind: Any, array: Any, row: Any) -> None:
    """Have a row of an array brought, line by line."""
    half, pointer = ir.IntType(32), ir.PointerType(_BYTE)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), (pointer, half, half, half)), "llvm.prefetch.p0i8"
    )
    how = half(1), half(3), half(1)  # to be written, near, data
    length = builder.extract_value(array.strides, 0)
    begin = builder.add(builder.ptrtoint(array.data, _WORD), builder.mul(row, length))
    if kind.ndim == 1:  # how long a row is, is known
        for offset in range(0, context.get_abi_sizeof(context.get_data_type(kind.dtype)), _LINE_BYTES):
            builder.call(function, (builder.inttoptr(builder.add(begin, _WORD(offset)), pointer), *how))
        return
    with cgutils.for_range_slice(builder, begin, builder.add(begin, length), _WORD(_LINE_BYTES)) as (at, _):
        builder.call(function, (builder.inttoptr(at, pointer), *how))


def as_record(values: NamedTuple) -> np.ndarray:
    """A tuple of numbers and small arrays as an array of one record.

    It crosses into compiled code several times faster than the tuple, and reads the same there.
    """
    dtype = [(name, *_dtype_of(value)) for name, value in values._asdict().items()]
    return np.array([tuple(values)], np.dtype(dtype))


def _dtype_of(value: Any) -> tuple[type, tuple[int, ...]]:
    return (np.int64 if isinstance(value, int) else np.float64), np.shape(value)
