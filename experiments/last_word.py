"""What is said where the runtime ends a process of a run, in one line.

JAX's runtime ends a process whose run has lost another one, from C++ and with a page of text. This
file runs as a process of its own, on the standard library alone. It reads what the runtime writes,
and the end of it is that of the process: if that had no word of its own, it gives one. The first
argument is the descriptor of a pipe on which the process says how to go on, and ``.`` at its end.
"""

import os
import sys

LOST = "lost another process of the run, or the connection to it"
"""What is said where another process cannot be reached."""


def main() -> None:
    """Waits for the end, then says what is to be said."""
    written = b""
    while chunk := os.read(0, 1 << 16):
        written = (written + chunk)[-(1 << 16) :]
    told = b""
    while chunk := os.read(int(sys.argv[1]), 1 << 16):
        told += chunk
    *hints, last = told.decode(errors="replace").split("\n")
    # A process that was killed has written nothing, and is not the one to tell.
    if last != "." and b"Check failure stack trace" in written:
        print("; ".join([f"error: {LOST}", *hints[-1:]]), file=sys.stderr)


if __name__ == "__main__":
    main()
