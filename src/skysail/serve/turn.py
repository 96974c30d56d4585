"""The operator's turn: one command at a time changes what runs over a data folder, and where its rows are."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator

from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.kit.workplace import lock


@contextlib.contextmanager
def turn(config: Config, progress: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other command is at it. Raises SkysailError when the one that was waited for left another configuration:
    what follows would start a controller on rows that have moved."""
    with contextlib.ExitStack() as held:
        if config.root.exists() and not held.enter_context(lock(config.root, fcntl.LOCK_EX | fcntl.LOCK_NB)):
            progress("waiting: another command is at work here")
            held.enter_context(lock(config.root, fcntl.LOCK_EX))
        if load(config.data) != config:
            raise SkysailError(f"{config.root / 'skysail.toml'} was changed meanwhile", "run it again")
        yield
