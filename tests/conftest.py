"""Makes `support` importable: pytest puts this file's folder on the path."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# What a shell starts in the background ignores SIGINT, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy host is no failure: no test asserts time.
settings.register_profile("any host", deadline=None)
settings.load_profile("any host")


@pytest.fixture(autouse=True)
def _whole_pools() -> Iterator[None]:
    """After each test every worker that goes on has given everything back and is whole.

    An engine looks its pools over whenever it has nothing left to do, and dies if one leaked.
    """
    yield
    workers = sys.modules.get("support.worker_stack")  # not imported for tests without one
    for stack in workers.WorkerStack.running if workers else []:
        stack.wait_until_idle()
