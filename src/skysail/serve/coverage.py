"""Writes docs/coverage.md: every operation of the service model, and which of them this cloud offers.

``python -m skysail.serve.coverage docs/coverage.md``; a test holds the page to the action table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from skysail.api.protocol import service_model
from skysail.kit.clock import SystemClock
from skysail.kit.config import Config
from skysail.serve.controller import action_table
from skysail.store.vault import Vault


def page() -> str:
    """The page's text."""
    offered = action_table(Config(), SystemClock(), Vault(bytes(32)))
    names = sorted(service_model().operation_names)
    rows = "".join(f"| `{name}` | {'yes' if name in offered else 'not yet'} |\n" for name in names)
    return (f"# Coverage\n\nGenerated from the service model and the action table: {len(offered)} of {len(names)} "
            f"operations are offered.\n\n| operation | offered |\n|---|---|\n{rows}")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
