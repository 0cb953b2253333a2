"""What numba's language lacks: raw addresses, 16-lane vectors, bfloat16, popcount, prefetch.

The CPU operators get addresses and strides instead of numpy arrays: a view of a larger cache would
be an array of unknown layout, which LLVM does not vectorise, and numpy has no bfloat16. Vectors are
explicit where a loop reads several rows at once, because LLVM gives up on it when it cannot prove
that the rows do not overlap. LLVM splits 16 lanes into whatever registers the machine has.

Every ``index`` counts elements of the type that is read or written; every ``address`` is in bytes.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

LANES = 16

# Of every 32-bit tensor; words of 64 bits and vectors lie in these too.
_ALIGNMENT = 4

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)


class _Float32x16(types.Type):  # type: ignore[misc]  # numba is untyped
    """Sixteen float32 values in registers."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = _Float32x16()


@register_model(_Float32x16)
class _Float32x16Model(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    """The LLVM type behind ``float32x16``."""

    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, _VECTOR)


def _element(builder: Any, address: Any, index: Any, element: Any, read_as: Any) -> Any:
    """Return a typed pointer to element ``index``."""
    pointer = builder.inttoptr(address, element.as_pointer())
    return builder.bitcast(builder.gep(pointer, [index]), read_as.as_pointer())


def _loader(element: Any, returned: Any, read_as: Any = None) -> Callable[..., Any]:
    """Make an intrinsic ``load(address, index)``."""

    def load(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _element(builder, arguments[0], arguments[1], element, read_as or element)
            # A row of a view starts wherever it starts: promise the tensor's alignment only.
            return builder.load(pointer, align=_ALIGNMENT)

        return returned(types.int64, types.int64), generate

    return load


def _storer(element: Any, stored: Any, write_as: Any = None) -> Callable[..., Any]:
    """Make an intrinsic ``store(address, index, value)``."""

    def store(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _element(builder, arguments[0], arguments[1], element, write_as or element)
            builder.store(arguments[2], pointer, align=_ALIGNMENT)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, stored), generate

    return store


load_int32 = intrinsic(_loader(_I32, types.int32))
load_int64 = intrinsic(_loader(_I64, types.int64))
load_float32 = intrinsic(_loader(_F32, types.float32))
load_vector = intrinsic(_loader(_F32, float32x16, _VECTOR))
store_int32 = intrinsic(_storer(_I32, types.int32))
store_float32 = intrinsic(_storer(_F32, types.float32))
store_vector = intrinsic(_storer(_F32, float32x16, _VECTOR))


@intrinsic
def load_bfloat16(typing_context: Any, address: Any, index: Any) -> Any:
    """Load a bfloat16 as float32: its bits are the upper half."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = builder.load(_element(builder, arguments[0], arguments[1], _I16, _I16), align=2)
        bits = builder.shl(builder.zext(half, _I32), ir.Constant(_I32, 16))
        return builder.bitcast(bits, _F32)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def load_vector_bfloat16(typing_context: Any, address: Any, index: Any) -> Any:
    """Load sixteen bfloat16 as float32."""
    narrow, words = ir.VectorType(_I16, LANES), ir.VectorType(_I32, LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = builder.load(_element(builder, arguments[0], arguments[1], _I16, narrow), align=2)
        bits = builder.shl(builder.zext(halves, words), ir.Constant(words, [16] * LANES))
        return builder.bitcast(bits, _VECTOR)

    return float32x16(types.int64, types.int64), generate


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """Repeat a float32 in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(undefined, arguments[0], ir.Constant(_I32, 0))
        order = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        return builder.shuffle_vector(first, undefined, order)

    return float32x16(types.float32), generate


@intrinsic
def multiply_add(typing_context: Any, left: Any, right: Any, addend: Any) -> Any:
    """Return ``left * right + addend`` for each lane, fused where the machine can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = f"llvm.fmuladd.v{LANES}f32"
        function = builder.module.declare_intrinsic(
            name, (), ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        )
        return builder.call(function, arguments)

    return float32x16(float32x16, float32x16, float32x16), generate


@intrinsic
def lane_sum(typing_context: Any, vector: Any) -> Any:
    """Add up the lanes, in whichever order is fastest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        function = builder.module.declare_intrinsic(
            name, (), ir.FunctionType(_F32, [_F32, _VECTOR])
        )
        zero = ir.Constant(_F32, -0.0)
        return builder.call(function, [zero, arguments[0]], fastmath=("reassoc",))

    return types.float32(float32x16), generate


@intrinsic
def positive_bits(typing_context: Any, vector: Any) -> Any:
    """Return an int32 whose bit ``i`` is set where lane ``i`` is above zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros = ir.Constant(_VECTOR, [0.0] * LANES)
        positive = builder.fcmp_ordered(">", arguments[0], zeros)
        return builder.zext(builder.bitcast(positive, ir.IntType(LANES)), _I32)

    return types.int32(float32x16), generate


@intrinsic
def popcount(typing_context: Any, word: Any) -> Any:
    """Count the set bits of an int32 or int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return word(word), generate


@intrinsic
def float_bits(typing_context: Any, value: Any) -> Any:
    """Return the bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def bits_float(typing_context: Any, bits: Any) -> Any:
    """Return the float32 that an int32's bits spell."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for a cache line that will be read soon; any address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        # for reading, keep in all cache levels, data
        flags = [ir.Constant(_I32, flag) for flag in (0, 3, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], byte), *flags])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def maximum_of_block(typing_context: Any, address: Any, index: Any) -> Any:
    """Return the largest of sixteen int32 from element ``index`` on."""
    words = ir.VectorType(_I32, LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = builder.load(_element(builder, arguments[0], arguments[1], _I32, words), align=4)
        name = f"llvm.vector.reduce.smax.v{LANES}i32"
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(_I32, [words]))
        return builder.call(function, [vector])

    return types.int32(types.int64, types.int64), generate
