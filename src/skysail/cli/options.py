"""Options that verbs of many nouns have."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

Json = Annotated[bool, Parameter(name="--json", negative="")]
Region = Annotated[str, Parameter(help="The region; the default one unless told.")]
