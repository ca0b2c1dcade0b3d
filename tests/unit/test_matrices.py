"""Which tensors are matrices, how they are cut into jobs and panels, and what these cost."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distmerge.matrices import (
    Facts,
    Matrix,
    alone,
    flops,
    is_matrix,
    is_transposed,
    jobs,
    matrices,
    panels,
    working_bytes,
)
from distmerge.spec import Cut

NOTHING = Facts()
LAYER = "model.layers.0."

MATRICES = [
    (f"{LAYER}self_attn.q_proj.weight", (32, 24)),
    (f"{LAYER}mlp.gate_up_proj", (64, 24)),
    (f"{LAYER}mlp.experts.3.w1.weight", (8, 16)),
    (f"{LAYER}mlp.experts.gate_up_proj", (4, 8, 16)),
    ("transformer.h.0.attn.c_attn.weight", (24, 72)),
    ("encoder.layer.0.attention.self.query.weight", (24, 24)),
    ("params.dense.kernel", (2, 2)),
]
OTHERS = [
    (f"{LAYER}input_layernorm.weight", (24,)),
    (f"{LAYER}self_attn.q_proj.bias", (24, 24)),
    (f"{LAYER}scalar.weight", (1, 24)),
    ("model.embed_tokens.weight", (60, 24)),
    ("transformer.wte.weight", (60, 24)),
    ("transformer.wpe.weight", (60, 24)),
    ("lm_head.weight", (60, 24)),
    ("score.weight", (2, 24)),
    ("classifier.dense.weight", (24, 24)),
    ("shared.weight", (60, 24)),
    ("output.weight", (60, 24)),
    ("vision.patch.conv.weight", (16, 3, 8)),
    ("vision.patch.conv.weight", (16, 3, 8, 8)),
    (f"{LAYER}mlp.experts.bias", (4, 1, 8)),
]


@pytest.mark.parametrize(("name", "shape"), MATRICES)
def test_weights_of_layers_and_stacks_of_experts_are_matrices(
    name: str, shape: tuple[int, ...]
) -> None:
    assert is_matrix(name, shape, NOTHING)


@pytest.mark.parametrize(("name", "shape"), OTHERS)
def test_embeddings_heads_and_convolutions_are_none(name: str, shape: tuple[int, ...]) -> None:
    assert not is_matrix(name, shape, NOTHING)


def test_what_has_a_side_of_the_vocabulary_is_none_whatever_its_name() -> None:
    name = "decoder.tokens.weight"
    assert is_matrix(name, (60, 24), Facts("llama", 61))
    assert not is_matrix(name, (60, 24), Facts("llama", 60))
    assert not is_matrix(name, (24, 60), Facts("llama", 60))


@pytest.mark.parametrize(
    ("model", "name", "shape", "expected"),
    [
        ("gpt2", "h.0.attn.c_attn.weight", (24, 72), True),
        ("gpt2", "transformer.h.0.mlp.c_proj.weight", (96, 24), True),
        ("gpt2", "h.0.attn.q_proj.weight", (24, 24), False),
        ("gpt_bigcode", "h.0.attn.c_attn.weight", (72, 24), False),
        ("llama4_text", f"{LAYER}feed_forward.experts.gate_up_proj", (4, 24, 72), True),
        ("gpt_oss", f"{LAYER}mlp.experts.down_proj", (4, 36, 24), True),
        ("qwen3_moe", f"{LAYER}mlp.experts.gate_up_proj", (4, 72, 24), False),
    ],
)
def test_models_that_store_inputs_first_are_known(
    model: str, name: str, shape: tuple[int, ...], expected: bool
) -> None:
    assert is_transposed(name, shape, Facts(model)) is expected


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], Cut]:
    """A shape and a cut that fits it."""
    transposed = draw(st.booleans())
    stack = draw(st.lists(st.integers(1, 5), max_size=1))
    parts = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    inputs = draw(st.integers(1, 9))
    sides = [inputs, sum(parts)] if transposed else [sum(parts), inputs]
    return (*stack, *sides), Cut(transposed, parts)


def found(shape: tuple[int, ...], cut: Cut) -> Iterator[Matrix]:
    for start, stop in jobs(shape, cut):
        for matrix in matrices(shape, cut, start, stop):
            assert start <= matrix.start
            last = matrix.start + (matrix.slices - 1) * matrix.step
            assert last + (matrix.rows - 1) * matrix.stride + matrix.columns <= stop
            yield matrix


@given(cuts())
def test_jobs_follow_on_each_other_and_make_up_the_tensor(
    given_: tuple[tuple[int, ...], Cut],
) -> None:
    shape, cut = given_
    bounds = list(jobs(shape, cut))
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == math.prod(shape)
    assert list(jobs(shape, None)) == [(0, math.prod(shape))]


@given(cuts())
def test_panels_of_matrices_cover_each_element_once_and_hold_what_belongs_together(
    given_: tuple[tuple[int, ...], Cut],
) -> None:
    """Against what plain indexing says: every slice by itself, every part of the outputs alone."""
    shape, cut = given_
    numbers = torch.arange(math.prod(shape)).view(-1, *shape[-2:])
    expected = [
        part.flatten().tolist()
        for each in numbers
        for part in each.split(cut.parts, dim=1 if cut.transposed else 0)
    ]
    flat, seen = numbers.flatten(), []
    for batch in found(shape, cut):
        for matrix in alone(batch):
            x = flat.as_strided((matrix.rows, matrix.columns), (matrix.stride, 1), matrix.start)
            if matrix.by_rows:
                whole = torch.cat([x[p.top : p.bottom, p.left : p.right] for p in panels(matrix)])
            else:
                parts = [x[p.top : p.bottom, p.left : p.right] for p in panels(matrix)]
                whole = torch.cat(parts, dim=1)
            assert torch.equal(whole, x)
            assert matrix.outputs in cut.parts
            assert {matrix.outputs, matrix.inputs} == {matrix.rows, matrix.columns}
            seen.append(x.flatten().tolist())
    assert sorted(seen) == sorted(expected)


SIDES = st.integers(1, 20_000)


@given(SIDES, SIDES, st.booleans())
def test_panels_run_along_the_longer_side_in_equal_steps(
    rows: int, columns: int, transposed: bool
) -> None:
    matrix = Matrix(0, rows, columns, columns, transposed)
    pieces = panels(matrix)
    lengths = [p.bottom - p.top if matrix.by_rows else p.right - p.left for p in pieces]
    others = {p.right - p.left if matrix.by_rows else p.bottom - p.top for p in pieces}
    assert others == {matrix.short}
    assert sum(lengths) == max(rows, columns)
    assert len(set(lengths[:-1])) <= 1
    assert lengths[-1] <= lengths[0]
    if len(pieces) > 1:
        assert lengths[0] % 64 == 0
        assert lengths[0] >= max(512, matrix.short // 2)


@given(SIDES, SIDES)
def test_a_matrix_and_its_transpose_fall_into_the_same_panels(rows: int, columns: int) -> None:
    """So they are worked on alike: a transposed square one along its rows."""
    one = panels(Matrix(0, rows, columns, columns, False))
    other = panels(Matrix(0, columns, rows, rows, True))
    assert [(p.left, p.right, p.top, p.bottom) for p in other] == [tuple(p) for p in one]


def test_small_slices_of_a_stack_are_one_job_and_large_ones_are_not() -> None:
    small, large = (300, 256, 512), (3, 8192, 4096)
    assert next(jobs(small, Cut(False, (256,)))) == (0, 128 * 256 * 512)
    assert len(list(jobs(large, Cut(False, (8192,))))) == 3


def test_contiguous_parts_are_jobs_and_parts_of_columns_are_not() -> None:
    assert list(jobs((40, 24), Cut(False, (24, 8, 8)))) == [(0, 576), (576, 768), (768, 960)]
    assert list(jobs((24, 40), Cut(True, (24, 8, 8)))) == [(0, 960)]


def test_costs_grow_with_what_makes_them() -> None:
    wide = Matrix(0, 1000, 4000, 4000, False)
    assert flops(wide, 4) == flops(wide._replace(rows=4000, columns=1000), 4)
    assert flops(wide._replace(slices=3), 4) == 3 * flops(wide, 4)
    assert flops(wide, 8) > flops(wide, 4)
    assert working_bytes(wide, 8, 2) > working_bytes(wide, 4, 2) > working_bytes(wide, 4, 2) / 2
    assert working_bytes(wide._replace(columns=64_000), 4, 2) < 2 * working_bytes(wide, 4, 2)
