r"""The compiled loop that takes the fields of reviews out of JSON lines, a block at a time.

It accepts a line only if that is one JSON object of ASCII characters in which everything is as it is in all but a few
lines of the dumps: ids are strings without escapes or spaces, the time is a whole number, no number is long or has an
exponent, and none of the wanted fields comes twice. What it does not accept may be good or bad; others decide that.

Notable: the lines of a block end with a newline, which no JSON value holds, so the loop stops there by itself and needs
no other check of where a line ends. A text's code points (``\u2019``) have to be folded, so such a line is left, too.
"""

import numpy as np

from calrec_jax.compiled import compiled
from calrec_jax.data import hashing

USER, ITEM, TIME, TEXT, SUMMARY = range(5)  # wanted fields, by their place
_WANTED = 5
_MOST_DIGITS = 15  # of a number: so many are exact in a float, too
_DEEPEST = 60  # levels of a value, a bit each
_TAB, _NEWLINE, _RETURN, _SPACE, _QUOTE, _BACKSLASH = 9, 10, 13, 32, 34, 92
_COMMA, _MINUS, _POINT, _ZERO, _NINE, _COLON = 44, 45, 46, 48, 57, 58
_OPEN_LIST, _CLOSE_LIST, _OPEN, _CLOSE, _TILDE = 91, 93, 123, 125, 126
_ESCAPES = np.zeros(256, np.uint8)  # what may follow a backslash; `u` is 2
_ESCAPES[list(b'"\\/bfnrt')] = 1
_ESCAPES[ord("u")] = 2
_PLAIN = np.zeros(256, np.bool_)  # in a string, what says itself
_PLAIN[_SPACE : _TILDE + 1] = True
_PLAIN[[_QUOTE, _BACKSLASH]] = False
_HEX = np.zeros(256, np.bool_)
_HEX[list(b"0123456789abcdefABCDEF")] = True


@compiled
def _after_spaces(data, at):  # pragma: no cover (compiled)
    while data[at] == _SPACE or data[at] == _TAB or data[at] == _RETURN:
        at += 1
    return at


@compiled
def _string(data, at):  # pragma: no cover (compiled)
    """(place of the closing quote, what was escaped) of the string that begins at `at`, its opening quote left out.

    Escaped is 0 nothing, 1 what one character says, 2 a code point; the place is −1 unless it is a string of ASCII.
    """
    escaped = 0
    while True:
        place = np.uint64(at)  # without a sign numba need not ask whether it counts from the end
        while _PLAIN[data[place]]:
            place += np.uint64(1)
        at = np.int64(place)
        if data[at] == _QUOTE:
            return at, escaped
        if data[at] != _BACKSLASH:
            return -1, 0
        kind = _ESCAPES[data[at + 1]]
        if kind == 0:
            return -1, 0
        at += 2
        if kind == 2:
            for _ in range(4):
                if not _HEX[data[at]]:
                    return -1, 0
                at += 1
        escaped = max(escaped, int(kind))


@compiled
def _number(data, at):  # pragma: no cover (compiled)
    """Where a number of at most `_MOST_DIGITS` digits without an exponent ends; −1 for any other."""
    begin = at
    if data[at] == _MINUS:
        at += 1
    first = at
    while _ZERO <= data[at] <= _NINE:
        at += 1
    if at == first or (data[first] == _ZERO and at > first + 1):
        return -1
    if data[at] == _POINT:
        at += 1
        point = at
        while _ZERO <= data[at] <= _NINE:
            at += 1
        if at == point:
            return -1
    return at if at - begin <= _MOST_DIGITS else -1


@compiled
def _name(data, at):  # pragma: no cover (compiled)
    """Where the value of the name that begins at `at` begins, or −1."""
    if data[at] != _QUOTE:
        return -1
    at, _ = _string(data, at + 1)
    if at < 0:
        return -1
    at = _after_spaces(data, at + 1)
    return _after_spaces(data, at + 1) if data[at] == _COLON else -1


@compiled
def _scalar(data, at):  # pragma: no cover (compiled)
    """Where a string, number or word ends, or −1."""
    byte = data[at]
    if byte == _QUOTE:
        at, _ = _string(data, at + 1)
        return at + 1 if at >= 0 else -1
    if byte == 116:  # true
        return at + 4 if data[at + 1] == 114 and data[at + 2] == 117 and data[at + 3] == 101 else -1
    if byte == 110:  # null
        return at + 4 if data[at + 1] == 117 and data[at + 2] == 108 and data[at + 3] == 108 else -1
    if byte == 102:  # false
        whole = data[at + 1] == 97 and data[at + 2] == 108 and data[at + 3] == 115 and data[at + 4] == 101
        return at + 5 if whole else -1
    return _number(data, at)


@compiled
def _value(data, at):  # pragma: no cover (compiled)
    """Where the value that begins at `at` ends, or −1."""
    objects, depth = np.uint64(0), 0  # a bit for each level: whether it is an object
    while True:
        byte = data[at]
        if byte in (_OPEN, _OPEN_LIST):
            if depth == _DEEPEST:
                return -1
            objects = (objects << np.uint64(1)) | np.uint64(byte == _OPEN)
            depth += 1
            at = _after_spaces(data, at + 1)
            if data[at] != (_CLOSE if byte == _OPEN else _CLOSE_LIST):
                if byte == _OPEN:
                    at = _name(data, at)
                    if at < 0:
                        return -1
                continue
        else:
            at = _scalar(data, at)
            if at < 0:
                return -1
            if depth == 0:
                return at
            at = _after_spaces(data, at)
        while data[at] != _COMMA:  # levels end
            if data[at] != (_CLOSE if objects & np.uint64(1) else _CLOSE_LIST):
                return -1
            objects >>= np.uint64(1)
            depth -= 1
            at += 1
            if depth == 0:
                return at
            at = _after_spaces(data, at)
        at = _after_spaces(data, at + 1)
        if objects & np.uint64(1):
            at = _name(data, at)
            if at < 0:
                return -1


@compiled
def _identifier_end(data, at):  # pragma: no cover (compiled)
    """Where a string of letters, digits and signs ends, its quote; −1 for any other, and an empty one."""
    begin = at
    while _SPACE < data[at] <= _TILDE and data[at] != _QUOTE and data[at] != _BACKSLASH:
        at += 1
    return at if data[at] == _QUOTE and at > begin else -1


@compiled
def _which(data, begin, end, names, ends):  # pragma: no cover (compiled)
    """The place of a name among the wanted ones, or −1."""
    first = 0
    for place in range(_WANTED):
        last = ends[place]
        if last - first == end - begin:
            same = True
            for offset in range(end - begin):
                if data[begin + offset] != names[first + offset]:
                    same = False
                    break
            if same:
                return place
        first = last
    return -1


@compiled
def _line(data, at, names, ends, spans):  # pragma: no cover (compiled)
    """Reads a line into `spans` ([5, 2], begin and end of each wanted field, −1 where it is absent).

    An id's span is that of its characters, the time's that of its digits, a text's that between its quotes.

    Returns:
      Where its newline is; −1 if the line is left to the exact parser.
    """
    spans[:] = -1
    seen = 0
    at = _after_spaces(data, at)
    if data[at] != _OPEN:
        return -1
    at = _after_spaces(data, at + 1)
    while True:
        if data[at] != _QUOTE:
            return -1
        end, escaped = _string(data, at + 1)
        if end < 0 or escaped:
            return -1
        field = _which(data, at + 1, end, names, ends)
        at = _after_spaces(data, end + 1)
        if data[at] != _COLON:
            return -1
        at = _after_spaces(data, at + 1)
        if field < 0:
            at = _value(data, at)
            if at < 0:
                return -1
        else:
            if seen >> field & 1:
                return -1
            seen |= 1 << field
            begin = at
            if field == TIME:
                at = _number(data, at)
                for place in range(begin, at):
                    if data[place] < _ZERO or data[place] > _NINE:
                        return -1
                if at < 0:
                    return -1
                spans[field, 0], spans[field, 1] = begin, at
            elif field <= ITEM:
                if data[at] != _QUOTE:
                    return -1
                at = _identifier_end(data, at + 1)
                if at < 0:
                    return -1
                spans[field, 0], spans[field, 1] = begin + 1, at
                at += 1
            elif data[at] == _QUOTE:
                at, escaped = _string(data, at + 1)
                if at < 0 or escaped == 2:
                    return -1
                spans[field, 0], spans[field, 1] = begin + 1, at
                at += 1
            else:  # no text
                at = _value(data, at)
                if at < 0:
                    return -1
        at = _after_spaces(data, at)
        if data[at] == _CLOSE:
            break
        if data[at] != _COMMA:
            return -1
        at = _after_spaces(data, at + 1)
    at = _after_spaces(data, at + 1)
    whole = data[at] == _NEWLINE and spans[USER, 0] >= 0 and spans[ITEM, 0] >= 0 and spans[TIME, 0] >= 0
    return at if whole else -1


@compiled
def scan(data, names, ends, begins, accepted, found, times, hashes):  # pragma: no cover (compiled)
    """Reads all lines of a block, each with its newline.

    Args:
      data: [bytes] uint8.
      names: the wanted fields' names, end to end.
      ends: [5] int64, where each of them ends.
      begins: [lines + 1] int64, gets where each line begins, and the end.
      accepted: [lines] bool, gets whether the line was read.
      found: [lines, 2, 2] int64, gets begin and end of user and item.
      times: [lines] int64.
      hashes: [lines, 2] int64, gets the text's hash, and whether there is one.
    """
    spans = np.empty((_WANTED, 2), np.int64)
    at = 0
    for line in range(len(accepted)):
        begins[line] = at
        newline = _line(data, at, names, ends, spans)
        accepted[line] = newline >= 0
        if newline >= 0:
            at = newline
            for field in (USER, ITEM):
                found[line, field, 0], found[line, field, 1] = spans[field, 0], spans[field, 1]
            time = 0
            for place in range(spans[TIME, 0], spans[TIME, 1]):
                time = 10 * time + data[place] - _ZERO
            times[line] = time
            state = hashing.start()
            for field in (TEXT, SUMMARY):
                if spans[field, 0] >= 0:
                    state = hashing.add(data, spans[field, 0], spans[field, 1], state, True)
            hashes[line, 0], hashes[line, 1] = hashing.finish(state)
        while data[at] != _NEWLINE:
            at += 1
        at += 1
    begins[len(accepted)] = at


@compiled
def copy(data, spans, out):  # pragma: no cover (compiled)
    """Writes the bytes of spans ([n, 2], begin and end) end to end."""
    at = 0
    for row in range(len(spans)):
        for place in range(spans[row, 0], spans[row, 1]):
            out[at] = data[place]
            at += 1
