"""Errors that carry what happened, why, and what cures it.

Every room raises a subclass of :class:`SkysailError`; the command line prints its three parts, the API turns those that
are a client's fault into Lightsail's error envelope.
"""

from __future__ import annotations


class SkysailError(Exception):
    """Something Skysail can explain: ``what`` happened, and the ``cure`` an operator can apply ('' if none is known)."""

    def __init__(self, what: str, cure: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.cure = cure


class ProcessFailed(SkysailError):
    """A child program exited non-zero, with ``code``; ``stderr`` holds the end of what it said. Without a code it did not
    begin, or did not end in time."""

    def __init__(self, what: str, stderr: str = "", cure: str = "", code: int | None = None) -> None:
        super().__init__(what, cure)
        self.stderr = stderr
        self.code = code


class ApiError(SkysailError):
    """A Lightsail API error: ``code`` is the model's exception name, ``status`` the HTTP status it answers with.

    Source: Lightsail API reference, "Common Errors" and the service model's exception shapes.
    """

    def __init__(self, code: str, message: str, tip: str = "", status: int = 400) -> None:
        super().__init__(message, tip)
        self.code = code
        self.status = status
        self.tip = tip


def invalid_input(message: str, tip: str = "") -> ApiError:
    """The request is well formed, but cannot be done as asked (wrong state, wrong value, name in use)."""
    return ApiError("InvalidInputException", message, tip)


def not_found(message: str, tip: str = "") -> ApiError:
    """The named resource does not exist in this region and account."""
    return ApiError("NotFoundException", message, tip)
