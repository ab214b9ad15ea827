"""Operations counted from a program's text: against products of known size, and convolutions place by place."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calrec_jax.train.hlo import Program, shapes, size_of


def test_a_scanned_body_counts_as_often_as_it_runs():
    x, w = jnp.ones((6, 8)), jnp.ones((5, 8, 8))

    def scanned(x, w):
        return jax.lax.scan(lambda carry, wi: (jnp.tanh(carry @ wi), None), x, w)[0]

    text = jax.jit(scanned).lower(x, w).compile().as_text()
    assert Program(text).cost().flops == 5 * 2 * 6 * 8 * 8, text


LOOPS = """HloModule m

%body.1 (p: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %p = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0} get-tuple-element(%p), index=2
  %dot.1 = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %ag = f32[8,8]{1,0} all-gather(%w), channel_id=3, dimensions={0}
  %ag.again = f32[8,8]{1,0} all-gather(%w), channel_id=3, dimensions={0}
  ROOT %t = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%i, %dot.1, %w)
}

%condition.1 (p: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %p.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] LIMIT
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: f32[4,8], w: f32[8,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %w.1 = f32[8,8]{1,0} parameter(1)
  %two = s32[] constant(2)
  %start = s32[] copy(%two)
  %tuple = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%start, %x.1, %w.1)
  %first = f32[8,8]{1,0} all-gather(%w.1), channel_id=3, dimensions={0}
  %while.1 = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%tuple), condition=%condition.1, body=%body.1
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_loops_multiply_their_body_and_copies_of_a_collective_count_once():
    known = Program(LOOPS.replace("LIMIT", "constant(7)")).cost()
    assert known.flops == 5 * 2 * 4 * 8 * 8, "from 2 to 7"
    assert known.collective_bytes == {"all-gather": (1 + 5) * 8 * 8 * 4}, "one before the loop, one a turn"
    assert known.dynamic_loops == []


def test_a_loop_of_unknown_length_is_listed_apart():
    dynamic = Program(LOOPS.replace("LIMIT", "get-tuple-element(%p.1), index=0")).cost()
    assert dynamic.flops == 0 and [turn.flops for turn in dynamic.dynamic_loops] == [2 * 4 * 8 * 8]
    assert [turn.collective_bytes for turn in dynamic.dynamic_loops] == [{"all-gather": 8 * 8 * 4}]


def test_a_body_that_stands_for_several_turns_runs_as_many_times_fewer():
    unrolled = LOOPS.replace("tuple(%i, %dot.1, %w)", "tuple(%i.next, %dot.1, %w)")
    step = "  %stride = s32[] constant(3)\n  %sum = s32[] add(%stride, %i)\n  %i.next = s32[] copy(%sum)\n  %x ="
    unrolled = unrolled.replace("  %x =", step, 1).replace("LIMIT", "constant(9)")
    assert Program(unrolled).cost().flops == 3 * 2 * 4 * 8 * 8, "at 2, 5 and 8"


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "low", "high", "base", "hole"),
    [(9, 3, 1, 0, 0, 1, 1), (9, 3, 2, 1, 1, 1, 1), (5, 4, 1, 3, 3, 2, 1), (8, 3, 1, 2, 2, 1, 2), (4, 4, 3, 3, 3, 4, 1)],
)
def test_a_convolution_counts_the_places_that_meet(length, kernel, stride, low, high, base, hole):
    padded = low + high + (length - 1) * base + 1
    out = (padded - ((kernel - 1) * hole + 1)) // stride + 1
    x, k, y = (f"f32[{a},{b},{c}]{{2,1,0}}" for a, b, c in ((2, length, 3), (kernel, 3, 5), (2, out, 5)))
    window = f"size={kernel} stride={stride} pad={low}_{high} lhs_dilate={base} rhs_dilate={hole}"
    lines = [
        "ENTRY %main (x: f32[], k: f32[]) -> f32[] {",
        f"  %x = {x} parameter(0)",
        f"  %k = {k} parameter(1)",
        f"  ROOT %c = {y} convolution(%x, %k), window={{{window}}}, dim_labels=b0f_0io->b0f",
        "}",
    ]
    row = np.zeros(padded, bool)
    row[low : low + (length - 1) * base + 1 : base] = True
    meet = sum(row[o * stride + k * hole] for o, k in itertools.product(range(out), range(kernel)))
    assert Program("\n".join(lines)).cost().flops == 2 * 2 * 3 * 5 * meet


def test_types_are_read_whole():
    text = "(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0}, pred[], s32[5])"
    assert shapes(text) == [("f32", (2, 3)), ("bf16", (4,)), ("pred", ()), ("s32", (5,))]
    assert size_of(text) == 24 + 8 + 1 + 20
