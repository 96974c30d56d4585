"""The wire: JSON 1.1 as botocore's Lightsail service model describes it, driven by the model at run time.

Parsing, validation and serialisation follow the model's shapes; there are no generated stubs. Times are epoch seconds as
JSON numbers. Source: Smithy, "AWS JSON 1.1 protocol".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
from botocore.loaders import Loader
from botocore.model import OperationModel, ServiceModel, Shape
from botocore.validate import ParamValidator

from skysail.kit.errors import ApiError, invalid_input

TARGET = "Lightsail_20161128."
DOCS = "https://docs.aws.amazon.com/lightsail/2016-11-28/api-reference/CommonErrors.html"
MAX_DEPTH = 16
MAX_MESSAGE = 1000
# The model's pattern of a ResourceName knows no dot, but the names that Lightsail takes may have one.
_PATTERNS = {"ResourceName": r"[A-Za-z0-9_.\-]*"}


@cache
def service_model() -> ServiceModel:
    """botocore's Lightsail model, loaded once."""
    return ServiceModel(Loader().load_service_model("lightsail", "service-2"), "lightsail")


def operation_model(target: str | None) -> OperationModel:
    """The operation that the X-Amz-Target header names; raises UnknownOperationException."""
    if not target:
        raise ApiError("UnknownOperationException", "The header X-Amz-Target is missing.",
                       f"It names the action: {TARGET}GetInstances")
    action = target.removeprefix(TARGET)
    if not target.startswith(TARGET) or action not in service_model().operation_names:
        raise ApiError("UnknownOperationException", f"The operation {target[:80]!r} is not known.")
    return service_model().operation_model(action)


def parse(operation: OperationModel, body: bytes) -> dict[str, Any]:
    """The validated parameters in ``body``; unknown members are dropped, as AWS does.

    Raises SerializationException for what is not JSON, InvalidInputException for what the model refuses.
    """
    try:
        params = msgspec.json.decode(body) if body.strip() else {}
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        raise ApiError("SerializationException", "The body is not valid JSON.") from None
    if not isinstance(params, dict):
        raise ApiError("SerializationException", "The body is not a JSON object.")
    shape = operation.input_shape
    if shape is None:
        return {}
    kept = _known(shape, params, 0)
    try:
        report = ParamValidator().validate(kept, shape)
    except (RuntimeError, OverflowError, OSError):  # botocore, of a number that is a time in no calendar
        raise invalid_input("A time in the request is out of range.") from None
    if report.has_errors():
        raise invalid_input(str(report.generate_report()))
    _check(shape, kept, operation.name)
    result: dict[str, Any] = kept
    return result


def _known(shape: Shape, value: Any, depth: int) -> Any:
    """``value`` without members that the model does not know, and without nulls."""
    if depth > MAX_DEPTH:
        raise ApiError("SerializationException", "The body is nested too deeply.")
    if shape.type_name == "structure" and isinstance(value, dict):
        return {name: _known(member, value[name], depth + 1) for name, member in shape.members.items()
                if value.get(name) is not None}
    if shape.type_name == "list" and isinstance(value, list):
        return [_known(shape.member, item, depth + 1) for item in value]
    if shape.type_name == "map" and isinstance(value, dict):
        return {key: _known(shape.value, item, depth + 1) for key, item in value.items() if item is not None}
    return value


def _check(shape: Shape, value: Any, where: str) -> None:
    """What botocore's validator leaves to the service: enums, patterns, upper bounds."""
    if shape.type_name == "structure":
        for name, item in value.items():
            _check(shape.members[name], item, name)
    elif shape.type_name == "list":
        for item in value:
            _check(shape.member, item, where)
    elif shape.type_name == "map":
        for key, item in value.items():
            _check(shape.key, key, where)
            _check(shape.value, item, where)
    elif shape.type_name == "string":
        _check_text(shape, value, where)
    elif shape.type_name in ("integer", "long"):
        if isinstance(value, bool):  # to Python a boolean is a number, to the model it is not
            raise invalid_input(f"{where} is a number, not a boolean.")
        # SQLite and the model's 32-bit integers both end before a hostile client does.
        if not -(2**31) <= value <= shape.metadata.get("max", 2**31 - 1):
            raise invalid_input(f"{where} is out of range.")


def _check_text(shape: Shape, value: str, where: str) -> None:
    if "\x00" in value or any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise invalid_input(f"{where} has characters that are not allowed.")
    # Before the pattern, which is the dearer look.
    if "max" in shape.metadata and len(value) > shape.metadata["max"]:
        raise invalid_input(f"{where} is longer than {shape.metadata['max']} characters.")
    choices = getattr(shape, "enum", None)
    if choices and value not in choices:
        raise invalid_input(f"{where} takes one of {', '.join(choices)}; not {value[:60]!r}.")
    pattern = _PATTERNS.get(shape.name) or shape.metadata.get("pattern")
    if pattern and not re.fullmatch(pattern, value):
        raise invalid_input(f"{where} does not have the form {pattern}.")


def serialise(operation: OperationModel, reply: dict[str, Any]) -> bytes:
    """The reply by the model: members it knows, nulls left out, timestamps as numbers."""
    shape = operation.output_shape
    render = _renderer(shape.name) if shape is not None else None
    return msgspec.json.encode(render(reply) if render is not None else {})


@cache
def _renderer(name: str) -> Callable[[Any], Any] | None:
    """What readies a value of the model's shape ``name`` for JSON, None where it is ready as it is.

    Compiled once per shape: to walk the model anew for each of a page's thousands of values takes as long as reading them
    from the store.
    """
    shape = service_model().shape_for(name)
    if shape.type_name == "structure":
        members = {member: of.name for member, of in shape.members.items()}

        def structure(value: dict[str, Any]) -> dict[str, Any]:
            made = {}
            for member, item in value.items():
                if item is not None and member in members:
                    render = _renderer(members[member])  # not before: a structure may hold others of its own kind
                    made[member] = item if render is None else render(item)
            return made

        return structure
    if shape.type_name == "list" and (each := _renderer(shape.member.name)) is not None:
        return lambda value: [each(item) for item in value]
    if shape.type_name == "timestamp":
        return lambda value: round(float(value), 3)
    return None


def error(failure: ApiError) -> bytes:
    """Lightsail's error envelope: ``__type`` and ``code`` are the same. What a client sent comes back in it only in part."""
    message = failure.what if len(failure.what) <= MAX_MESSAGE else failure.what[:MAX_MESSAGE] + "…"
    return msgspec.json.encode({"__type": failure.code, "code": failure.code, "message": message, "docs": DOCS,
                                "tip": failure.tip})
