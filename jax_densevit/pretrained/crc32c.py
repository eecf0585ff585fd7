"""CRC-32C (Castagnoli) of large buffers, by NumPy."""

import functools

import numpy as np

_POLYNOMIAL = np.uint32(0x82F63B78)  # reflected
_LANES = 2**13
_SMALL = 2**16  # bytes below which lanes do not pay


@functools.cache
def _tables() -> np.ndarray:
    """`[4, 256]` uint32: what 1 to 4 further bytes make of each byte ("slicing by four")."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ _POLYNOMIAL, table >> 1)
    tables = [table]
    for _ in range(3):
        tables.append(table[tables[-1] & 0xFF] ^ (tables[-1] >> 8))
    return np.stack(tables)


@functools.cache
def _shift(doublings: int) -> np.ndarray:
    """`[4, 256]`: a register after `4 * 2 ** doublings` zero bytes is the XOR of an entry for each of its bytes."""
    if doublings == 0:
        return _tables()[::-1]
    half = _shift(doublings - 1)
    return _apply(half, half)


def _apply(operator: np.ndarray, registers: np.ndarray) -> np.ndarray:
    r = registers
    return operator[0][r & 0xFF] ^ operator[1][(r >> 8) & 0xFF] ^ operator[2][(r >> 16) & 0xFF] ^ operator[3][r >> 24]


def crc32c(data) -> int:
    """The checksum of a bytes-like object."""
    data = np.frombuffer(data, np.uint8)
    register = np.uint32(0xFFFFFFFF)
    while len(data) >= _SMALL:
        # Lanes of 4 * 2**k bytes, all run side by side, then joined pair by pair.
        doublings = int(np.log2(len(data) // (4 * _LANES))) if len(data) >= 4 * _LANES else 0
        doublings = min(doublings, 12)
        words = 2**doublings
        size = 4 * words * _LANES
        block = np.ascontiguousarray(data[:size].view("<u4").reshape(_LANES, words).T)
        registers = np.zeros(_LANES, np.uint32)
        registers[0] = register
        one = _shift(0)
        for word in block:
            registers = _apply(one, registers ^ word)
        while len(registers) > 1:
            registers = _apply(_shift(doublings), registers[::2]) ^ registers[1::2]
            doublings += 1
        register, data = registers[0], data[size:]
    table = _tables()[0].tolist()
    value = int(register)
    for byte in data.tobytes():
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def unmask(stored: int) -> int:
    """The checksum that LevelDB's tables store rotated and offset, to tell it from one over checksums."""
    rotated = (stored - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF
