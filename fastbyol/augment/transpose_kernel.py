"""Transposes an array of float32 in blocks that fit into vector registers, for `cpu_kernel`, whose filters run across lines."""

from __future__ import annotations

from typing import Any, cast

from llvmlite import ir
from numba import extending, types

from fastbyol.host.compile_cache import njit

OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}
TILE = 16
"""Side of the blocks that are transposed in registers: one cache line of float32."""


@cast(Any, extending.intrinsic)  # callers leave out the first argument, the typing context
def _transpose_tile(typing: Any, source: Any, begin: Any, stride: Any, out: Any, at: Any, out_stride: Any):
    """Sets out[at + i out_stride + j] = source[begin + j stride + i] for i, j < TILE. Flat C-contiguous arrays; bounds are not checked.

    Vector code written by hand, because the compiler moves one float at a time here. Processors with narrower vectors get it in
    shorter pieces.
    """
    vector, index = ir.VectorType(ir.FloatType(), TILE), ir.VectorType(ir.IntType(32), TILE)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        source, begin, stride, out, at, out_stride = values

        def line_at(array_type: Any, array: Any, first: Any, distance: Any, number: int) -> Any:
            place = builder.add(first, builder.mul(distance, ir.Constant(distance.type, number)))
            data = context.make_array(array_type)(context, builder, array).data
            return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

        lines = [builder.load(line_at(signature.args[0], source, begin, stride, number), align=4) for number in range(TILE)]
        for step in (1, 2, 4, 8):  # exchanges the off-diagonal quarters of ever larger blocks
            upper = [lane if not lane & step else TILE + lane - step for lane in range(TILE)]
            lower = [lane + step if not lane & step else TILE + lane for lane in range(TILE)]
            for number in range(TILE):
                if not number & step:
                    pair = lines[number], lines[number + step]
                    lines[number], lines[number + step] = (builder.shuffle_vector(*pair, ir.Constant(index, m)) for m in (upper, lower))
        for number, line in enumerate(lines):
            builder.store(line, line_at(signature.args[3], out, at, out_stride, number), align=4)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, out, types.int64, types.int64), generate


@njit(**OPTIONS)
def transpose(source, begin, lines, length, stride, out, at, out_stride):
    """Sets out[at + i out_stride + j] = source[begin + j stride + i] for i < length, j < lines; flat arrays."""
    if min(lines, length) < TILE:
        for i in range(length):
            for j in range(lines):
                out[at + i * out_stride + j] = source[begin + j * stride + i]
        return
    for j_block in range(0, lines, TILE):
        j = min(j_block, lines - TILE)  # the last block overlaps the one before: every block is whole
        for i_block in range(0, length, TILE):
            i = min(i_block, length - TILE)
            _transpose_tile(source, begin + j * stride + i, stride, out, at + i * out_stride + j, out_stride)
