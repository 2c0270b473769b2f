"""Packed codes: the round trip, the layout byte by byte, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import comq_np


def code_type(bits):
    return np.uint8 if bits <= 8 else np.uint16


def codes_of(m, n, bits, seed=0):
    return np.random.default_rng([m, n, bits, seed]).integers(0, 2**bits, (m, n)).astype(code_type(bits))


def packed_by_hand(column, bits):
    """Bytes of one output channel, bit by bit: the stream as one large number, the first code lowest."""
    number = sum(int(code) << (bits * i) for i, code in enumerate(column))
    return list(number.to_bytes(-(-len(column) * bits // 8), "little"))


@given(m=st.integers(1, 70), n=st.integers(1, 9), bits=st.integers(1, 16), seed=st.integers(0, 99))
def test_round_trip_and_layout(m, n, bits, seed):
    codes = codes_of(m, n, bits, seed)
    packed = comq_np.pack_codes(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (n, -(-m * bits // 8))
    assert packed.tolist() == [packed_by_hand(column, bits) for column in codes.T]
    back = comq_np.unpack_codes(packed, bits, m)
    assert back.dtype == code_type(bits)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    [
        ([1, 0, 1, 1, 0, 0, 0, 0, 1], 1, [0b00001101, 0b00000001]),
        ([1, 2, 3], 2, [0b00111001]),
        ([1, 2, 3], 3, [0b11010001, 0b00000000]),
        ([7, 7, 7], 3, [0b11111111, 0b00000001]),
        ([1, 2, 3], 4, [0x21, 0x03]),
        ([31, 1], 5, [0b00111111, 0b00000000]),
        ([63, 0, 63], 6, [0b00111111, 0b11110000, 0b00000011]),
        ([127, 1], 7, [0xFF, 0x00]),
        ([200, 7], 8, [200, 7]),
        ([0x101, 0x1FF], 9, [0x01, 0b11111111, 0b00000011]),
        ([0xABC, 0x123], 12, [0xBC, 0x3A, 0x12]),
        ([0x7FFF, 1], 15, [0xFF, 0b11111111, 0b00000000, 0b00000000]),
        ([0xABCD, 0x0123], 16, [0xCD, 0xAB, 0x23, 0x01]),
    ],
)
def test_documented_bytes(codes, bits, expected):
    assert comq_np.pack_codes(np.array(codes)[:, None], bits).tolist() == [expected]
    assert comq_np.unpack_codes(np.array([expected], np.uint8), bits, len(codes))[:, 0].tolist() == codes


def test_each_output_channel_is_a_row_of_its_own():
    packed = comq_np.pack_codes(np.array([[1, 3], [2, 0]]), 2)
    assert packed.tolist() == [[0b1001], [0b0011]]


@pytest.mark.parametrize(("b", "m", "n"), [(1, 9, 4), (5, 9, 1), (3, 20, 7), (0, 9, 2), (2, 0, 3)])
@pytest.mark.parametrize("bits", [1, 3, 4, 8, 11])
def test_each_problem_is_packed_as_if_alone(b, m, n, bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (b, m, n)).astype(code_type(bits))
    packed = comq_np.pack_codes(codes, bits)
    assert packed.shape == (b, n, -(-m * bits // 8))
    for one, bytes_of_one in zip(codes, packed, strict=True):
        np.testing.assert_array_equal(bytes_of_one, comq_np.pack_codes(one, bits))
    back = comq_np.unpack_codes(packed, bits, m)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_size(bits):
    assert comq_np.pack_codes(codes_of(768, 64, bits), bits).nbytes == 64 * 768 * bits // 8


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint16, ">u2"])
@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray])
def test_any_integer_type_and_layout(dtype, layout):
    codes = codes_of(13, 5, 3)
    wide = layout(codes.astype(dtype))
    wide.flags.writeable = False
    np.testing.assert_array_equal(comq_np.pack_codes(wide, 3), comq_np.pack_codes(codes, 3))
    np.testing.assert_array_equal(comq_np.pack_codes(wide, 11), comq_np.pack_codes(codes, 11))
    part = slice(None, None, -1), slice(None, None, 2)
    np.testing.assert_array_equal(comq_np.pack_codes(wide[part], 3), comq_np.pack_codes(codes[part].copy(), 3))


def test_results_of_a_solve_survive(problem):
    W, _, G = problem(33, 7)
    for bits in range(1, 17):
        codes = comq_np.solve(W, G, bits).codes
        np.testing.assert_array_equal(comq_np.unpack_codes(comq_np.pack_codes(codes, bits), bits, 33), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        ([[4]], 2, "`codes` must lie from 0 to 3 for 2 bits, got 4 to 4."),
        ([[-1, 2]], 4, "`codes` must lie from 0 to 15 for 4 bits, got -1 to 2."),
        ([[4096]], 12, "`codes` must lie from 0 to 4095 for 12 bits, got 4096 to 4096."),
        ([1, 2], 4, "`codes` must be a 2-D or 3-D array of integers, got 1-D of dtype int64."),
        ([[[[1]]]], 4, "`codes` must be a 2-D or 3-D array of integers, got 4-D of dtype int64."),
        ([[1.0]], 4, "`codes` must be a 2-D or 3-D array of integers, got 2-D of dtype float64."),
        ([[[1], [16]]], 4, "`codes` must lie from 0 to 15 for 4 bits, got 1 to 16."),
        ([[1]], 0, "`bits` must be an integer from 1 to 16, got 0."),
        ([[1]], 17, "`bits` must be an integer from 1 to 16, got 17."),
        ([[1]], 4.0, "`bits` must be an integer from 1 to 16, got 4.0."),
    ],
)
def test_refused_codes(codes, bits, message):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.pack_codes(codes, bits)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("packed", "got"),
    [
        (np.zeros((2, 4), np.uint8), "uint8 of shape (2, 4)"),
        (np.zeros((2, 3), np.int8), "int8 of shape (2, 3)"),
        (np.zeros(3, np.uint8), "uint8 of shape (3,)"),
        (np.zeros((3, 2, 4), np.uint8), "uint8 of shape (3, 2, 4)"),
        (np.zeros((1, 3, 2, 3), np.uint8), "uint8 of shape (1, 3, 2, 3)"),
    ],
)
def test_refused_bytes(packed, got):
    with pytest.raises(comq_np.InputError) as error:
        comq_np.unpack_codes(packed, 4, 5)
    assert str(error.value) == f"`packed` must be uint8 of shape ([b,] n, 3) for 5 codes of 4 bits, got {got}."
