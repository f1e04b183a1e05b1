"""The C library's heap, where tensors on a CPU live."""

import ctypes

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1


def keep_freed_blocks() -> bool:
    """Let this process keep the blocks that it frees, for the next ones of their size.

    By default glibc hands blocks of 32 MB and more back to the kernel, which has to clear every
    page of them again for the next step: a fifth of the time of a small tower's update. The
    process stays as large as it once was.

    Returns:
        Whether the C library could be told; others than glibc cannot.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, LARGEST) for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
