"""The C allocator's settings for large arrays, which can only be given by the environment of a new process.

Notable: on Linux with glibc a verb that trains or decodes starts itself once more with them. docs/performance.md has
what that gains, and `CALREC_ALLOCATOR=0` switches it off.
"""

from __future__ import annotations

import os
import sys

# Large arrays come from one arena that is neither returned to the system nor cut into mappings, on huge pages: freed
# and allocated again at each step, they otherwise cost a page fault per 4 KiB.
SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
SWITCH = "CALREC_ALLOCATOR"


def set_allocator() -> None:
    """Starts this command once more with the allocator's settings, unless they are there or not wanted."""
    if os.environ.get(SWITCH) in ("0", "set") or not has_glibc():
        return
    environment = {**SETTINGS, **os.environ, SWITCH: "set"}  # what the user has set stays
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def has_glibc() -> bool:
    """Whether the C library is glibc, whose settings these are."""
    try:
        return sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
