"""Runs a command that dies with its supervisor: `python launch.py SUPERVISOR_PID COMMAND...`.

A script of its own, run by path without site packages, because `preexec_fn` would fork a
supervisor that has gRPC threads. The kernel keeps the death signal across `exec`.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    supervisor, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it died before the kernel knew
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
