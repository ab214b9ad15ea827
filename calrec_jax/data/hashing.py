"""A review's words as 64 bits: folded, so that texts which differ in case, spaces and ASCII punctuation alone agree.

Notable: letters and digits are gathered into words of eight bytes, lower case, each mixed in as by MurmurHash64A
(A. Appleby, 2008; its length comes last here, since it is known last). Texts of a shop are no adversary, so two that
differ agree with a probability of about 2^-64; SHA-1, which is safe against one too, took longer than all the rest of
reading a line. A state is (hash, word begun, bits in it, bytes so far).
"""

import numpy as np

from calrec_jax.compiled import compiled

_FOLDED = np.zeros(256, np.uint8)  # 0: left out
_FOLDED[128:] = range(128, 256)
for _code in filter(str.isalnum, map(chr, range(128))):
    _FOLDED[ord(_code)] = ord(_code.lower())
_BITS = (_FOLDED > 0).astype(np.uint64) * np.uint64(8)
_FACTOR = np.uint64(0xC6A4A7935BD1E995)
_SHIFT, _BYTE, _WORD, _ZERO, _ONE, _TWO, _THREE = map(np.uint64, (47, 8, 64, 0, 1, 2, 3))
_BACKSLASH = 92


@compiled
def start():  # pragma: no cover (compiled)
    """The state before a text."""
    return _ZERO, _ZERO, _ZERO, _ZERO


@compiled
def _mixed(value, word):  # pragma: no cover (compiled)
    word *= _FACTOR
    word ^= word >> _SHIFT
    word *= _FACTOR
    return (value ^ word) * _FACTOR


@compiled
def add(data, begin, end, state, escapes):  # pragma: no cover (compiled)
    """The state after the bytes [begin, end) of `data`; with `escapes`, a backslash and the next byte are left out."""
    value, word, bits, length = state
    at, end = np.uint64(begin), np.uint64(end)  # without a sign numba need not ask whether it counts from the end
    while at < end:
        byte = data[at]
        if escapes and byte == _BACKSLASH:  # all that one character says after it is no letter: \" \\ \/ \b \f \n \r \t
            at += _TWO
            continue
        at += _ONE
        word |= np.uint64(_FOLDED[byte]) << bits
        bits += _BITS[byte]  # without a branch: one in six bytes is left out, and none can say which
        if bits == _WORD:
            value = _mixed(value, word)
            length += _BYTE
            word, bits = _ZERO, _ZERO
    return value, word, bits, length


@compiled
def finish(state):  # pragma: no cover (compiled)
    """(hash as a signed integer, whether there was a letter or digit)."""
    value, word, bits, length = state
    length += bits >> _THREE
    if bits:
        value = _mixed(value, word)
    value = (value ^ length) * _FACTOR
    value ^= value >> _SHIFT
    value *= _FACTOR
    return np.int64(value ^ (value >> _SHIFT)), length > _ZERO


@compiled
def of_bytes(data):  # pragma: no cover (compiled)
    """The same of a whole text, [bytes] uint8."""
    return finish(add(data, 0, len(data), start(), False))
