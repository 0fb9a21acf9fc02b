"""What the engine does when a device has done something."""

from __future__ import annotations

from collections.abc import Callable

from omniserve.gpuworker.device.port import Event


class Afterwards:
    """Actions that wait for events. Owned by the engine's loop, which looks often."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Event, Callable[[], object]]] = []

    def call(self, event: Event, action: Callable[[], object]) -> None:
        """Calls `action` now if the event is done, else from the first `look` after it is."""
        if event.done():
            action()
        else:
            self._waiting.append((event, action))

    def look(self) -> None:
        """Calls what may be called; never blocks."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for event, action in waiting:
            self.call(event, action)

    def is_empty(self) -> bool:
        return not self._waiting
