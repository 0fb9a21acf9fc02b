"""The whole system as processes of this machine: what `omniserve up`, the demo and tests run."""

from omniserve.client.stack.settings import StackSettings
from omniserve.client.stack.supervisor import ProcessFailedError, Stack

__all__ = ["ProcessFailedError", "Stack", "StackSettings"]
