"""The gateway: one HTTP request's way, as a list to read from top to bottom.

limits → target → signature → parse → dispatch → serialise. Whatever goes wrong ends in Lightsail's error envelope; an
unexpected error is logged with the request's id and answers ServiceException without detail.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from skysail.api import protocol, signature
from skysail.api.dispatch import Dispatcher
from skysail.api.wire import MAX_BODY_BYTES, too_large
from skysail.kit.clock import Clock
from skysail.kit.errors import ApiError, invalid_input
from skysail.resources.request import Request

log = logging.getLogger(__name__)
# Each worker holds one connection to the store (see store/database.py: the pool has as many and a few more).
WORKERS = 8


def application(dispatcher: Dispatcher, find_secret: Callable[[str], tuple[str, str] | None], *, clock: Clock,
                regions: Collection[str], lifespan: Any = None, beside: Sequence[Route] = ()) -> Starlette:
    """The API as an ASGI application: ``POST /`` is Lightsail in each of ``regions``, ``GET /healthz`` says that we live,
    ``beside`` is what else answers at this address."""
    workers = ThreadPoolExecutor(WORKERS, "request")

    def answer(headers: Mapping[str, str], query: bytes, body: bytes) -> bytes:
        operation = protocol.operation_model(headers.get("x-amz-target"))
        caller = signature.verify(headers, body, query=query, now=clock.now(), find_secret=find_secret)
        if caller.region not in regions:
            served = f"the region {next(iter(regions))}" if len(regions) == 1 else "the regions " + ", ".join(regions)
            raise invalid_input(f"This cloud serves {served}; the request is signed for {caller.region[:32]}.",
                                "Set the region of your client: eval \"$(sudo ./skysail env)\"")
        params = protocol.parse(operation, body)
        reply = dispatcher.run(Request(caller.account_id, caller.region, operation.name, params))
        return protocol.serialise(operation, reply)

    async def lightsail(http: HttpRequest) -> Response:
        identifier = str(uuid.uuid4())
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in http.scope["headers"]}
        try:
            body = await _read(http)
            return _response(200, await asyncio.get_running_loop().run_in_executor(
                workers, answer, headers, http.scope["query_string"], body), identifier)
        except ClientDisconnect:
            return Response(status_code=400)
        except ApiError as failure:
            return _response(failure.status, protocol.error(failure), identifier)
        except Exception:
            log.exception("request %s failed", identifier)
            ours = ApiError("ServiceException", f"Something failed on our side (request {identifier}).", status=500)
            return _response(500, protocol.error(ours), identifier)

    async def healthz(_http: HttpRequest) -> Response:
        return PlainTextResponse("ok")

    async def elsewhere(http: HttpRequest, _refusal: Exception) -> Response:
        failure = ApiError("UnknownOperationException", f"Nothing answers {http.method} {http.url.path[:80]!r}.",
                           "The Lightsail API is POST / with the header X-Amz-Target.", status=404)
        return _response(failure.status, protocol.error(failure), str(uuid.uuid4()))

    protocol.service_model()
    return Starlette(routes=[Route("/", lightsail, methods=["POST"]), Route("/healthz", healthz), *beside],
                     lifespan=lifespan, exception_handlers={404: elsewhere, 405: elsewhere})


async def _read(http: HttpRequest) -> bytes:
    body = b""
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large("body", MAX_BODY_BYTES, 413)
    return body


def _response(status: int, body: bytes, identifier: str) -> Response:
    return Response(body, status, media_type="application/x-amz-json-1.1",
                    headers={"x-amzn-RequestId": identifier})
