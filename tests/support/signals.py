"""Signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Sends a child `number`; with SIGSTOP returns when none of its threads runs any more.

    Until then a stopped server may answer, as many messages as it likes.
    """
    process.send_signal(number)
    if number is signal.SIGSTOP:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
