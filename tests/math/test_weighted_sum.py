"""The kernel against exact arithmetic, and what it promises to the bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmerge.methods.average import Terms, count_nonfinite, weighted_sums
from distmerge.spec import BLOCK_ELEMENTS
from tests.support.kernels import weighted_sum
from tests.support.reference import bound, exact_sum

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (BF16, F16, F32, F64)
BITS = {BF16: torch.int16, F16: torch.int16, F32: torch.int32, F64: torch.int64}
properties = settings(settings.get_profile("math"))
dtypes = st.sampled_from(DTYPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bits(x: torch.Tensor) -> torch.Tensor:
    """What `x` is to the bit: 0.0 and -0.0 differ."""
    return x.view(BITS[x.dtype])


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(bits(x), bits(y))


def summed(
    inputs: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    dtype: torch.dtype,
    block: int = BLOCK_ELEMENTS,
) -> torch.Tensor:
    """The kernel's result, which must be sound, in a tensor of its own."""
    out = torch.full_like(inputs[0], torch.nan, dtype=dtype)
    assert weighted_sum(inputs, coefficients, out, block=block)
    return out


def check(inputs: Sequence[torch.Tensor], coefficients: Sequence[float], out: torch.Tensor) -> None:
    """Assert that each element of `out` lies within the bound of the exact sum."""
    working = F64 if F64 in (out.dtype, *(x.dtype for x in inputs)) else F32
    exact = exact_sum(inputs, coefficients)
    near = torch.tensor([float(value) for value in exact], dtype=F64)
    allowed = bound(inputs, coefficients, near, out.dtype, working).tolist()
    for found, value, limit in zip(out.double().tolist(), exact, allowed, strict=True):
        assert abs(Fraction(found) - value) <= Fraction(limit), (found, float(value), limit)


def weights_like(count: int, seed: int) -> list[float]:
    return [random.Random(seed + i).uniform(-2, 2) for i in range(count)]


def tensors_like(kinds: Sequence[torch.dtype], length: int, seed: int = 0) -> list[torch.Tensor]:
    """Normal numbers over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(len(kinds), length, generator=generator, dtype=F64)
    scales = torch.randint(-12, 6, (len(kinds), length), generator=generator)
    return [x.to(kind) for x, kind in zip(torch.ldexp(numbers, scales), kinds, strict=True)]


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*DTYPES, "mixed"], ids=str)
@pytest.mark.parametrize("count", range(1, 9))
def test_sum_is_exact_but_for_one_rounding_and_that_of_the_terms(
    count: int, kind: torch.dtype | str, out: torch.dtype
) -> None:
    kinds = [kind if isinstance(kind, torch.dtype) else DTYPES[i % 4] for i in range(count)]
    inputs, coefficients = tensors_like(kinds, 203, seed=count), weights_like(count, 100 + count)
    check(inputs, coefficients, summed(inputs, coefficients, out))


def test_an_average_of_three_in_bfloat16_has_no_bias() -> None:
    """Weights in the tensors' own dtype would scale the result by 1.0018."""
    inputs = [x.abs() for x in tensors_like([BF16] * 3, 100_000)]
    found = float(summed(inputs, [1 / 3] * 3, BF16).double().sum())
    exact = sum(float(x.double().sum()) for x in inputs) / 3
    assert found == pytest.approx(exact, rel=1e-4)


def test_a_sum_that_crosses_a_power_of_two_is_within_the_bound() -> None:
    """Just below 1 the exact sum has half the ulp that the accumulated one may have."""
    inputs = [torch.tensor([1 - 2**-24]), torch.tensor([2**-25 + 2**-30])]
    check(inputs, [1.0, 1.0], summed(inputs, [1.0, 1.0], F32))


values = st.lists(st.floats(-64, 64, width=16), min_size=1, max_size=40)
weights = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=8)


@st.composite
def sums(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[float], torch.dtype]:
    """Inputs of any dtypes that hold nasty numbers, as many weights, and an output dtype."""
    coefficients = draw(weights)
    length = draw(st.integers(1, 12))
    numbers = st.lists(st.floats(-64, 64, width=16), min_size=length, max_size=length)
    inputs = [torch.tensor(draw(numbers), dtype=draw(dtypes)) for _ in coefficients]
    return inputs, coefficients, draw(dtypes)


@properties
@given(sums())
def test_any_sum_is_within_the_bound(
    case: tuple[list[torch.Tensor], list[float], torch.dtype],
) -> None:
    inputs, coefficients, dtype = case
    check(inputs, coefficients, summed(inputs, coefficients, dtype))


@properties
@given(sums(), st.randoms(use_true_random=False))
def test_the_order_of_the_models_matters_no_more_than_rounding(
    case: tuple[list[torch.Tensor], list[float], torch.dtype], order: random.Random
) -> None:
    inputs, coefficients, dtype = case
    pairs = list(zip(inputs, coefficients, strict=True))
    order.shuffle(pairs)
    found = summed([x for x, _ in pairs], [c for _, c in pairs], dtype)
    check(inputs, coefficients, found)


def finite_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a 16-bit dtype; of others, those at the edges and many between."""
    if torch.finfo(dtype).bits == 16:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        return every[every.isfinite()]
    info = torch.finfo(dtype)
    least = info.tiny * info.eps  # the smallest subnormal number
    edges = [0.0, -0.0, least, -least, 3 * least, info.tiny, -info.tiny, info.max / 8, -info.eps]
    normal = tensors_like([dtype], 999)[0]
    return torch.cat([torch.tensor(edges, dtype=dtype), normal, normal * info.tiny])


@every_dtype
def test_one_model_of_weight_one_comes_out_to_the_bit(dtype: torch.dtype) -> None:
    x = finite_patterns(dtype)
    x = x[x.abs() <= torch.finfo(dtype).max / 8] if dtype != F16 else x  # so that no sum overflows
    assert same_bits(summed([x], [1.0], dtype), x)


@properties
@given(values, dtypes)
def test_one_model_of_weight_one_is_the_identity(numbers: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(numbers, dtype=dtype)
    assert same_bits(summed([x], [1.0], dtype), x)


@every_dtype
def test_a_first_term_of_minus_zero_keeps_its_sign(dtype: torch.dtype) -> None:
    x = torch.tensor([-0.0, -0.0], dtype=dtype)
    assert same_bits(summed([x, x], [0.5, 0.5], dtype), x)


LENGTHS = (1, 7, 1024, 1025, 65_537, 98_304, 98_304 + 31, 3 * 98_304 + 1)


@pytest.mark.parametrize("length", LENGTHS)
@every_dtype
def test_the_block_size_does_not_change_a_bit(dtype: torch.dtype, length: int) -> None:
    inputs, coefficients = tensors_like([BF16, dtype, F16], length), [0.3, -1.7, 1 / 3]
    whole = summed(inputs, coefficients, dtype, block=length)
    for block in (1024, 64 * 1024, BLOCK_ELEMENTS):
        assert same_bits(summed(inputs, coefficients, dtype, block=block), whole)


@properties
@given(st.lists(st.integers(-128, 128), min_size=1, max_size=20), st.data())
def test_sums_of_whole_numbers_by_powers_of_two_are_exact(
    numbers: list[int], data: st.DataObject
) -> None:
    """Every step is representable in every dtype: nothing may be lost."""
    count = data.draw(st.integers(1, 4))
    powers = data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=count, max_size=count))
    dtype = data.draw(st.sampled_from([F16, F32, F64]))
    inputs = [torch.tensor(numbers[i:] + numbers[:i], dtype=dtype) for i in range(count)]
    expected = sum(c * x.double() for c, x in zip(powers, inputs, strict=True))
    assert torch.equal(summed(inputs, powers, dtype).double(), torch.as_tensor(expected))


@properties
@given(sums(), st.integers(-6, 6))
def test_scaling_the_weights_by_a_power_of_two_scales_the_sum(
    case: tuple[list[torch.Tensor], list[float], torch.dtype], power: int
) -> None:
    inputs = [x.float() for x in case[0]]
    coefficients = [round(c, 2) for c in case[1]]  # far from where float32 would underflow
    plain = summed(inputs, coefficients, F64)
    scaled = summed(inputs, [c * 2.0**power for c in coefficients], F64)
    assert torch.equal(scaled, plain * 2.0**power)


@pytest.mark.parametrize("place", [0, 1023, 1024, 2999])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_dtype
def test_nan_or_inf_in_an_input_is_told(dtype: torch.dtype, bad: float, place: int) -> None:
    inputs = tensors_like([dtype, dtype], 3000)
    inputs[1][place] = bad
    out = torch.empty(3000, dtype=dtype)
    assert not weighted_sum(inputs, [0.5, 0.5], out, block=1024)
    assert count_nonfinite(out) == 1


def test_infinities_that_cancel_are_told() -> None:
    infinite = torch.tensor([torch.inf])
    assert not weighted_sum([infinite, infinite], [1.0, -1.0], torch.empty(1), block=1024)


@pytest.mark.parametrize("kind", [F16, BF16, F32, F64], ids=str)
def test_a_result_that_float16_does_not_hold_is_told(kind: torch.dtype) -> None:
    x = torch.full((3000,), 1.0, dtype=kind)
    x[2000] = 60_000
    out = torch.empty(3000, dtype=F16)
    assert not weighted_sum([x, x], [1.0, 1.0], out, block=1024)
    assert count_nonfinite(out) == 1


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_a_result_beyond_its_own_dtype_is_told(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    assert not weighted_sum([x, x], [1.0, 1.0], torch.empty_like(x), block=1024)


@every_dtype
def test_large_finite_values_are_sound(dtype: torch.dtype) -> None:
    """A block full of the largest float16, or one of the largest number of any other dtype."""
    length = BLOCK_ELEMENTS if dtype == F16 else 1
    x = torch.full((length,), torch.finfo(dtype).max, dtype=dtype)
    assert same_bits(summed([x, x], [0.5, 0.5], dtype), x)


def test_inputs_are_left_as_they_were() -> None:
    inputs = tensors_like([BF16, F16, F32, F64], 5000)
    before = [x.clone() for x in inputs]
    for dtype in DTYPES:
        summed(inputs, [0.1, 0.2, 0.3, 0.4], dtype, block=1024)
    assert all(map(same_bits, inputs, before))


def test_the_output_may_be_part_of_a_larger_buffer() -> None:
    buffer = torch.full((300,), 7.0)
    x = tensors_like([F32], 100)[0]
    assert weighted_sum([x], [1.0], buffer[100:200], block=64)
    assert same_bits(buffer[100:200], x)
    assert buffer[:100].eq(7).all()
    assert buffer[200:].eq(7).all()


@properties
@given(st.lists(st.sampled_from([0.0, 1.0, torch.nan, torch.inf, -torch.inf])), dtypes)
def test_values_that_are_not_finite_are_counted(numbers: list[float], dtype: torch.dtype) -> None:
    expected = sum(x not in (0.0, 1.0) for x in numbers)
    assert count_nonfinite(torch.tensor(numbers, dtype=dtype)) == expected


def summed_together(
    inputs: Sequence[torch.Tensor],
    sums: Sequence[Terms],
    outs: Sequence[torch.dtype],
    block: int = 7,
) -> list[torch.Tensor]:
    """All `sums` from one read, each in a tensor of its own."""
    results = [torch.full_like(inputs[0], torch.nan, dtype=dtype) for dtype in outs]
    assert all(weighted_sums(inputs, sums, results, block=block))
    return results


def check_each_is_as_if_alone(
    inputs: Sequence[torch.Tensor], sums: Sequence[Terms], outs: Sequence[torch.dtype]
) -> None:
    found = summed_together(inputs, sums, outs)
    for terms, dtype, result in zip(sums, outs, found, strict=True):
        own, values = [inputs[i] for i, _ in terms], [c for _, c in terms]
        assert same_bits(result, summed(own, values, dtype, block=7))


@st.composite
def many_sums(
    draw: st.DrawFn,
) -> tuple[list[torch.Tensor], list[list[tuple[int, float]]], list[torch.dtype]]:
    """Inputs of any dtypes, and sums that each take some of them, with zeros among the weights."""
    inputs = draw(sums())[0]
    signed = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), st.floats(-8, 8, width=32))
    places = st.sets(st.integers(0, len(inputs) - 1), min_size=1).map(sorted)
    terms = [
        [(place, draw(signed)) for place in draw(places)] for _ in range(draw(st.integers(1, 6)))
    ]
    return inputs, terms, [draw(dtypes) for _ in terms]


@properties
@given(many_sums())
def test_no_sum_depends_on_what_else_is_summed(
    case: tuple[list[torch.Tensor], list[list[tuple[int, float]]], list[torch.dtype]],
) -> None:
    check_each_is_as_if_alone(*case)


@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_a_float64_input_makes_only_its_own_sums_more_precise(out: torch.dtype) -> None:
    inputs = tensors_like([F32, F64, BF16, F32], 100)
    without: Terms = [(0, 0.1), (2, -0.7), (3, 1 / 3)]
    every: Terms = [(0, 0.1), (1, 0.0), (2, -0.7), (3, 1 / 3)]
    check_each_is_as_if_alone(inputs, [without, every, [(1, 1.0)]], [out, out, out])
    plain, precise = summed_together(inputs, [without, every], [F64, F64])
    assert same_bits(plain, precise)  # for a float64 output itself makes its sum precise
    plain, precise = summed_together(inputs, [without, every], [F32, F32])
    assert not same_bits(plain, precise)


def test_a_sum_of_nothing_but_zeros_is_zero() -> None:
    inputs = tensors_like([F32, BF16], 20)
    zeros, other = summed_together(inputs, [[(0, 0.0), (1, 0.0)], [(0, 1.0)]], [F32, F32])
    assert not zeros.any()
    assert same_bits(other, inputs[0])


def test_each_sum_tells_for_itself_whether_it_went_well() -> None:
    inputs = tensors_like([F32, F32, F32], 50)
    inputs[0][30], inputs[1][40] = 60_000, torch.nan
    sums: list[Terms] = [[(0, 1.0), (2, 1.0)], [(0, 2.0)], [(0, 2.0)], [(1, 1.0)], [(2, -1.0)]]
    outs = [torch.empty(50, dtype=dtype) for dtype in (F16, F16, BF16, F32, F16)]
    for block in (7, 50):
        assert weighted_sums(inputs, sums, outs, block=block) == [True, False, True, False, True]
    assert [count_nonfinite(out) for out in outs] == [0, 1, 0, 1, 0]
