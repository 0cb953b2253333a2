"""Operations that numba lacks: raw addresses, 16-lane vectors, bfloat16, popcount, prefetch.

The CPU operators get addresses and strides instead of numpy arrays: a view of a larger cache would
be an array of unknown layout, which LLVM does not vectorise, and numpy has no bfloat16. Vectors are
explicit where a loop reads several rows at once, because LLVM does not vectorise it if it cannot
prove that the rows do not overlap. LLVM splits 16 lanes into the registers that the machine has.

Every ``index`` counts elements of the type that is read or written; every ``address`` is in bytes.
"""

from collections.abc import Callable
from typing import Any, Literal

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16

WIDE_REGISTERS = bool(get_host_cpu_features().get("avx512f"))
"""Whether the machine has 32 registers of sixteen float32; else they are 16 of eight."""

# Bytes; the alignment of every tensor of at least 32 bits, from which 64-bit words and vectors are
# read as well.
_ALIGNMENT = 4

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_BLOCK = ir.ArrayType(_VECTOR, LANES)


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


class _Block(types.Type):  # type: ignore[misc]  # numba is untyped
    """Sixteen vectors of sixteen float32: the sums of a tile of rows and queries."""

    def __init__(self) -> None:
        super().__init__(name="float32x16x16")


float32x16x16 = _Block()


@register_model(_Block)
class _BlockModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    """The LLVM type behind ``float32x16x16``; LLVM takes it apart into registers."""

    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, _BLOCK)


def _element(builder: Any, address: Any, index: Any, element: Any, read_as: Any) -> Any:
    """Return a typed pointer to element ``index``."""
    pointer = builder.inttoptr(address, element.as_pointer())
    return builder.bitcast(builder.gep(pointer, [index]), read_as.as_pointer())


def _bytes(element: Any) -> int:
    """Return the size of an LLVM scalar."""
    return 4 if element == _F32 else element.width // 8


def _load_lanes(builder: Any, address: Any, index: Any, narrow: bool) -> Any:
    """Load sixteen float32, or sixteen bfloat16 as float32: their bits are the upper half."""
    if not narrow:
        return builder.load(_element(builder, address, index, _F32, _VECTOR), align=_ALIGNMENT)
    halves, words = ir.VectorType(_I16, LANES), ir.VectorType(_I32, LANES)
    loaded = builder.load(_element(builder, address, index, _I16, halves), align=2)
    bits = builder.shl(builder.zext(loaded, words), ir.Constant(words, [16] * LANES))
    return builder.bitcast(bits, _VECTOR)


def _repeat(builder: Any, value: Any) -> Any:
    """Repeat a float32 in all lanes."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    order = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, undefined, order)


def _multiply_add(builder: Any, left: Any, right: Any, addend: Any) -> Any:
    """Return ``left * right + addend`` for each lane, fused where the machine can."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = builder.module.declare_intrinsic(f"llvm.fmuladd.v{LANES}f32", (), kind)
    return builder.call(function, [left, right, addend])


def _prefetch(builder: Any, address: Any) -> None:
    """Prefetch a line for a read of data, to the second level."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
    flags = [ir.Constant(_I32, flag) for flag in (0, 2, 1)]
    builder.call(function, [builder.inttoptr(address, byte), *flags])


def _loader(element: Any, returned: Any, read_as: Any = None) -> Callable[..., Any]:
    """Make an intrinsic ``load(address, index)``."""

    def load(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _element(builder, arguments[0], arguments[1], element, read_as or element)
            # A row of a view may start anywhere: promise only the tensor's alignment.
            return builder.load(pointer, align=min(_ALIGNMENT, _bytes(element)))

        return returned(types.int64, types.int64), generate

    return load


def _storer(element: Any, stored: Any, write_as: Any = None) -> Callable[..., Any]:
    """Make an intrinsic ``store(address, index, value)``."""

    def store(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = _element(builder, arguments[0], arguments[1], element, write_as or element)
            builder.store(arguments[2], pointer, align=min(_ALIGNMENT, _bytes(element)))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, stored), generate

    return store


load_uint8 = intrinsic(_loader(_I8, types.uint8))
load_int16 = intrinsic(_loader(_I16, types.int16))
load_int32 = intrinsic(_loader(_I32, types.int32))
load_int64 = intrinsic(_loader(_I64, types.int64))
load_float32 = intrinsic(_loader(_F32, types.float32))
load_vector = intrinsic(_loader(_F32, float32x16, _VECTOR))
store_int16 = intrinsic(_storer(_I16, types.int16))
store_int32 = intrinsic(_storer(_I32, types.int32))
store_int64 = intrinsic(_storer(_I64, types.int64))
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
def store_bfloat16(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Store a float32 as the nearest bfloat16, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index, value = arguments
        bits, sixteen = builder.bitcast(value, _I32), ir.Constant(_I32, 16)
        odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        # Rounding could turn a NaN into a number.
        missing = builder.fcmp_unordered("uno", value, value)
        kept = builder.select(missing, ir.Constant(_I32, 0x7FC00000), rounded)
        half = builder.trunc(builder.lshr(kept, sixteen), _I16)
        builder.store(half, _element(builder, address, index, _I16, _I16), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """Repeat a float32 in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _repeat(builder, arguments[0])

    return float32x16(types.float32), generate


@intrinsic
def multiply_add(typing_context: Any, left: Any, right: Any, addend: Any) -> Any:
    """Return ``left * right + addend`` for each lane, fused where the machine can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _multiply_add(builder, *arguments)

    return float32x16(float32x16, float32x16, float32x16), generate


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
def bits_float(typing_context: Any, bits: Any) -> Any:
    """Reinterpret an int32's bits as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Prefetch a cache line that will be read soon; any address is allowed.

    It goes to the second-level cache, because the first allows too few pending lines: random rows
    of a large cache took half the time of a prefetch to the first.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


KEYS = 8


def weighed_distances(pairs: int, num_planes: int) -> Any:
    """Make an intrinsic ``(keys, table, out, best, double)``: the scores of eight keys in a row.

    A key has ``pairs`` 64-bit words; its int32 score is ``best`` minus the weighted distance,
    shifted left by ``double``. ``table`` holds the majority's words, then each plane's (see
    ``hamming_score``). It is written with vectors because LLVM by itself would count bits word by
    word.
    """
    lanes = ir.VectorType(_I64, KEYS * pairs)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        keys, table, out, best, double = arguments

        def repeated(item: int) -> Any:
            words = ir.VectorType(_I64, pairs)
            pointer = _element(builder, table, ir.Constant(_I64, item * pairs), _I64, words)
            loaded = builder.load(pointer, align=_ALIGNMENT)
            order = ir.Constant(ir.VectorType(_I32, KEYS * pairs), list(range(pairs)) * KEYS)
            return builder.shuffle_vector(loaded, loaded, order)

        pointer = builder.inttoptr(keys, lanes.as_pointer())
        differing = builder.xor(builder.load(pointer, align=_ALIGNMENT), repeated(0))
        distance = ir.Constant(lanes, [0] * (KEYS * pairs))
        count_bits = builder.module.declare_intrinsic(
            f"llvm.ctpop.v{KEYS * pairs}i64", (), ir.FunctionType(lanes, [lanes])
        )
        for plane in range(num_planes):
            counts = builder.call(count_bits, [builder.and_(differing, repeated(1 + plane))])
            shift = ir.Constant(lanes, [plane] * (KEYS * pairs))
            distance = builder.add(distance, builder.shl(counts, shift))
        width = KEYS * pairs
        while width > KEYS:  # add up each key's words, neighbours first
            width //= 2
            halves = [
                ir.Constant(ir.VectorType(_I32, width), list(range(side, 2 * width, 2)))
                for side in (0, 1)
            ]
            even, odd = (builder.shuffle_vector(distance, distance, half) for half in halves)
            distance = builder.add(even, odd)
        words = ir.VectorType(_I32, KEYS)
        order = ir.Constant(words, [0] * KEYS)

        def splat_int(value: Any) -> Any:
            undefined = ir.Constant(words, ir.Undefined)
            narrow = builder.trunc(value, _I32)
            first = builder.insert_element(undefined, narrow, ir.Constant(_I32, 0))
            return builder.shuffle_vector(first, undefined, order)

        counted = builder.shl(builder.trunc(distance, words), splat_int(double))
        pointer = builder.inttoptr(out, words.as_pointer())
        builder.store(builder.sub(splat_int(best), counted), pointer, align=_ALIGNMENT)
        return context.get_dummy_value()

    def score(typing_context: Any, keys: Any, table: Any, out: Any, best: Any, double: Any) -> Any:
        return types.void(*[types.int64] * 5), generate

    return intrinsic(score)


Kind = Literal["int16", "int32", "float32"]
"""Types that sixteen scores can be read as."""

_KINDS: dict[Kind, tuple[Any, Any]] = {
    "int16": (_I16, types.int16),
    "int32": (_I32, types.int32),
    "float32": (_F32, types.float32),
}


def _load_kind(builder: Any, kind: Kind, address: Any, index: Any) -> Any:
    element, _ = _KINDS[kind]
    pointer = _element(builder, address, index, element, ir.VectorType(element, LANES))
    return builder.load(pointer, align=_bytes(element))


def _compare(builder: Any, kind: Kind, predicate: str, left: Any, right: Any) -> Any:
    if kind == "float32":
        return builder.fcmp_ordered(predicate, left, right)
    return builder.icmp_signed(predicate, left, right)


def marks(kind: Kind, predicate: Literal[">", ">="]) -> Any:
    """Make an intrinsic ``(address, index, bound)``: which of sixteen scores pass, a bit for each.

    ``bound`` is of the scores' kind; bit ``i`` of the int32 belongs to element ``index + i``.
    """
    element, numba_type = _KINDS[kind]

    def mark(typing_context: Any, address: Any, index: Any, bound: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            scores = _load_kind(builder, kind, arguments[0], arguments[1])
            lanes = ir.VectorType(element, LANES)
            undefined = ir.Constant(lanes, ir.Undefined)
            first = builder.insert_element(undefined, arguments[2], ir.Constant(_I32, 0))
            order = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
            bounds = builder.shuffle_vector(first, undefined, order)
            passed = _compare(builder, kind, predicate, scores, bounds)
            return builder.zext(builder.bitcast(passed, ir.IntType(LANES)), _I32)

        return types.int32(types.int64, types.int64, numba_type), generate

    return intrinsic(mark)


def column_maxima(kind: Kind) -> Any:
    """Make an intrinsic ``(address, index, out)``: the maxima of sixteen columns of 256 scores.

    Column ``i`` is every sixteenth score from element ``index + i`` on; written in the same kind.
    """
    element, _ = _KINDS[kind]

    def maxima(typing_context: Any, address: Any, index: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index, out = arguments
            best = _load_kind(builder, kind, address, index)
            for row in range(1, LANES):
                place = builder.add(index, ir.Constant(_I64, LANES * row))
                scores = _load_kind(builder, kind, address, place)
                best = builder.select(_compare(builder, kind, ">", scores, best), scores, best)
            pointer = builder.inttoptr(out, ir.VectorType(element, LANES).as_pointer())
            builder.store(best, pointer, align=_bytes(element))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return intrinsic(maxima)


@intrinsic
def lowest_bit(typing_context: Any, word: Any) -> Any:
    """Return the position of the lowest set bit of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int32(types.int32), generate


@intrinsic
def empty_sums(typing_context: Any) -> Any:
    """Return a block of sums, all zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_BLOCK, [ir.Constant(_VECTOR, [0.0] * LANES)] * LANES)

    return float32x16x16(), generate


def sums_of_rows(num_queries: int, narrow: bool) -> Any:
    """Make an intrinsic that adds the products of some queries with some rows to a block.

    ``(block, query, query_stride, rows, whole, soon, later)`` takes the first ``whole`` channels, a
    multiple of sixteen, of ``num_queries`` float32 queries, ``query_stride`` elements apart, and of
    ``16 // num_queries`` rows, whose addresses are stored at ``rows``; rows are bfloat16 if
    ``narrow``. Vector ``q * height + r`` of the block belongs to query ``q`` and row ``r``.
    Four sums are computed at a time, which hides the latency of an addition and leaves registers
    free. Rows whose addresses are stored at ``soon`` and ``later`` are prefetched meanwhile, a line
    beside each that is read: in one go they would fill the queue of pending lines, and all else
    would wait (measured: 4.6 instead of 8 GB/s on one thread).
    """
    height = LANES // num_queries
    asked = num_queries if WIDE_REGISTERS else min(num_queries, 2)
    together = 4 // asked

    def step(
        typing_context: Any, block: Any, query: Any, query_stride: Any, rows: Any, whole: Any,
        soon: Any, later: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            block, query, query_stride, rows, whole, soon, later = arguments
            zero, width = ir.Constant(_I64, 0), ir.Constant(_I64, LANES)
            size = ir.Constant(_I64, 2 if narrow else 4)

            def address(of: Any, r: int) -> Any:
                return builder.load(_element(builder, of, ir.Constant(_I64, r), _I64, _I64))

            tiles = [
                (range(q, q + asked), range(r, r + together))
                for r in range(0, height, together)
                for q in range(0, num_queries, asked)
            ]
            for queries, own in tiles:
                places = [(q, r) for q in queries for r in own]
                sums = {}
                for q, r in places:
                    sums[q, r] = cgutils.alloca_once(builder, _VECTOR)
                    builder.store(builder.extract_value(block, q * height + r), sums[q, r])
                addresses = {r: address(rows, r) for r in own}
                # Each row is read once for each tile of queries, and each list prefetched in one.
                fetched = [soon] if queries[0] == 0 else [later] if queries[0] == asked else []
                if num_queries == asked:
                    fetched = [soon, later]
                ahead = [address(of, r) for of in fetched for r in own]
                with cgutils.for_range_slice(builder, zero, whole, width, _I64) as (i, _):
                    for one in ahead:
                        _prefetch(builder, builder.add(one, builder.mul(i, size)))
                    values = {r: _load_lanes(builder, a, i, narrow) for r, a in addresses.items()}
                    for q, r in places:
                        place = builder.mul(query_stride, ir.Constant(_I64, q))
                        state = _load_lanes(builder, query, builder.add(place, i), narrow=False)
                        old = builder.load(sums[q, r])
                        builder.store(_multiply_add(builder, state, values[r], old), sums[q, r])
                for q, r in places:
                    block = builder.insert_value(block, builder.load(sums[q, r]), q * height + r)
            return block

        return float32x16x16(float32x16x16, *[types.int64] * 6), generate

    return intrinsic(step)


def store_row_sums(num_queries: int) -> Any:
    """Make an intrinsic that adds up the lanes of each vector of ``sums_of_rows``.

    ``(block, out, stride)`` writes ``16 // num_queries`` float32 for each query, ``stride``
    elements apart. Sixteen vectors are added up together, in four rounds that halve their number,
    which takes a third of the work of adding up the lanes of each.
    """
    rounds = (
        # the lanes of two vectors that are added: within pairs, within fours, then across fours
        ([0, 16, 1, 17], [2, 18, 3, 19]),
        ([0, 1, 16, 17], [2, 3, 18, 19]),
    )
    quarters = ([0, 2, 4, 6], [1, 3, 5, 7])

    def lanes(round_number: int, side: int) -> list[int]:
        if round_number < 2:
            return [4 * four + lane for four in range(4) for lane in rounds[round_number][side]]
        return [4 * four + lane for four in quarters[side] for lane in range(4)]

    def store(typing_context: Any, block: Any, out: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            block, out, stride = arguments
            vectors = [builder.extract_value(block, item) for item in range(LANES)]
            for number in range(4):
                masks = [
                    ir.Constant(ir.VectorType(_I32, LANES), lanes(number, side)) for side in (0, 1)
                ]
                vectors = [
                    builder.fadd(*(builder.shuffle_vector(left, right, mask) for mask in masks))
                    for left, right in zip(vectors[::2], vectors[1::2], strict=True)
                ]
            height = LANES // num_queries
            piece = ir.VectorType(_F32, height)
            for q in range(num_queries):
                order = ir.Constant(
                    ir.VectorType(_I32, height), list(range(q * height, (q + 1) * height))
                )
                sums = builder.shuffle_vector(vectors[0], vectors[0], order)
                place = builder.mul(stride, ir.Constant(_I64, q))
                builder.store(sums, _element(builder, out, place, _F32, piece), align=_ALIGNMENT)
            return context.get_dummy_value()

        return types.void(float32x16x16, types.int64, types.int64), generate

    return intrinsic(store)


@intrinsic
def looked_up_sums(
    typing_context: Any,
    table: Any,
    codes: Any,
    code_stride: Any,
    parts: Any,
    count: Any,
    out: Any,
    stride: Any,
    queries: Any,
) -> Any:
    """Write, for sixteen keys and up to four queries, the sums of the table entries of the codes.

    A key has ``parts`` codes of one byte, and keys are ``code_stride`` bytes apart; ``table`` is
    ``[parts, count, 4]`` float32. ``queries`` rows of sixteen float32, ``stride`` elements apart,
    are written at ``out``.
    """
    four = ir.VectorType(_F32, 4)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, codes, code_stride, parts, count, out, stride, queries = arguments
        sums = [cgutils.alloca_once(builder, four) for _ in range(LANES)]
        for total in sums:
            builder.store(ir.Constant(four, [0.0] * 4), total)
        with cgutils.for_range(builder, parts, intp=_I64) as loop:
            first = builder.mul(loop.index, count)
            for lane, total in enumerate(sums):
                place = builder.mul(code_stride, ir.Constant(_I64, lane))
                pointer = _element(builder, codes, builder.add(place, loop.index), _I8, _I8)
                code = builder.zext(builder.load(pointer, align=1), _I64)
                entry = builder.mul(builder.add(first, code), ir.Constant(_I64, 4))
                products = builder.load(
                    _element(builder, table, entry, _F32, four), align=_ALIGNMENT
                )
                builder.store(builder.fadd(builder.load(total), products), total)
        vectors = [builder.load(total) for total in sums]
        while len(vectors) > 1:  # all in a row: four queries of key 0, of key 1 and so on
            width = 2 * vectors[0].type.count
            order = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
            vectors = [
                builder.shuffle_vector(left, right, order)
                for left, right in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        for q in range(4):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(_I64, q), queries)):
                order = ir.Constant(
                    ir.VectorType(_I32, LANES), [4 * lane + q for lane in range(LANES)]
                )
                row = builder.shuffle_vector(vectors[0], vectors[0], order)
                place = builder.mul(stride, ir.Constant(_I64, q))
                builder.store(row, _element(builder, out, place, _F32, _VECTOR), align=_ALIGNMENT)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


def weighted_sums(num_queries: int, num_vectors: int, narrow: bool) -> Any:
    """Make an intrinsic that adds one row, weighted for each query, to the queries' sums.

    ``(block, weights, weight_stride, row, i)`` adds the ``16 * num_vectors`` channels from ``i`` on
    of the row at that address, times each query's weight; vector ``q * num_vectors + v`` of the
    block belongs to query ``q``.
    """

    def step(
        typing_context: Any, block: Any, weights: Any, weight_stride: Any, row: Any, i: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            block, weights, weight_stride, row, i = arguments
            values = [
                _load_lanes(builder, row, builder.add(i, ir.Constant(_I64, LANES * v)), narrow)
                for v in range(num_vectors)
            ]
            for q in range(num_queries):
                place = builder.mul(weight_stride, ir.Constant(_I64, q))
                pointer = _element(builder, weights, place, _F32, _F32)
                weight = _repeat(builder, builder.load(pointer, align=_ALIGNMENT))
                for v in range(num_vectors):
                    item = q * num_vectors + v
                    sums = builder.extract_value(block, item)
                    sums = _multiply_add(builder, weight, values[v], sums)
                    block = builder.insert_value(block, sums, item)
            return block

        return float32x16x16(float32x16x16, *[types.int64] * 4), generate

    return intrinsic(step)


def load_sums(num_queries: int, num_vectors: int) -> Any:
    """Make an intrinsic ``(sums, stride)`` that loads a block as ``weighted_sums`` orders it."""

    def load(typing_context: Any, sums: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            block = ir.Constant(_BLOCK, ir.Undefined)
            for item, place in _sum_places(builder, arguments[1], num_queries, num_vectors):
                vector = _load_lanes(builder, arguments[0], place, narrow=False)
                block = builder.insert_value(block, vector, item)
            return block

        return float32x16x16(types.int64, types.int64), generate

    return intrinsic(load)


def store_sums(num_queries: int, num_vectors: int) -> Any:
    """Make an intrinsic ``(block, sums, stride)`` that writes what ``load_sums`` reads."""

    def store(typing_context: Any, block: Any, sums: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            for item, place in _sum_places(builder, arguments[2], num_queries, num_vectors):
                pointer = _element(builder, arguments[1], place, _F32, _VECTOR)
                builder.store(builder.extract_value(arguments[0], item), pointer, align=_ALIGNMENT)
            return context.get_dummy_value()

        return types.void(float32x16x16, types.int64, types.int64), generate

    return intrinsic(store)


def _sum_places(builder: Any, stride: Any, num_queries: int, num_vectors: int) -> Any:
    """Yield each vector of a block and the element of its first lane."""
    for q in range(num_queries):
        for v in range(num_vectors):
            place = builder.mul(stride, ir.Constant(_I64, q))
            yield q * num_vectors + v, builder.add(place, ir.Constant(_I64, LANES * v))
