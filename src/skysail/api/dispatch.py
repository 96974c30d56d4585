"""Dispatch: the action table; one action is one transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import Connection

from skysail.kit.errors import invalid_input
from skysail.resources.request import Request

Action = Callable[[Connection, Request], dict[str, Any]]
_READS = ("Get", "Is", "Check")


class Dispatcher:
    """Runs actions; ``transaction(write)`` gives each its own."""

    def __init__(self, actions: Mapping[str, Action],
                 transaction: Callable[[bool], AbstractContextManager[Connection]]) -> None:
        self._actions = actions
        self._transaction = transaction

    def run(self, request: Request) -> dict[str, Any]:
        """The action's reply; raises ApiError, and InvalidInputException for an action that is not offered yet."""
        action = self._actions.get(request.action)
        if action is None:
            raise invalid_input(f"{request.action} is not offered by this cloud yet.",
                                "docs/coverage.md lists the actions that are.")
        write = not request.action.startswith(_READS)
        with self._transaction(write) as connection:
            return action(connection, request)
