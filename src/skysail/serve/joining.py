"""Where machines that join ask the controller: a listener of its own, by TLS under the authority of the hosts, which a token
names. It is there only where ``join_listen`` says so.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from skysail.api.wire import MAX_BODY_BYTES, Wire
from skysail.hosts import admission
from skysail.hosts.admission import Admission, Application, Refused
from skysail.hosts.credentials import Credentials, show
from skysail.kit import certificates
from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.serve import beside
from skysail.store.database import Database

log = logging.getLogger(__name__)
AGAIN_SECONDS = 5.0


def application(config: Config, database: Database, credentials: Credentials, clock: Clock) -> Starlette:
    """GET /authority (PEM, which is no secret), POST /join."""

    async def authority(_request: Request) -> Response:
        return Response((await asyncio.to_thread(credentials.authority)).pem, media_type="application/x-pem-file")

    async def join(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return PlainTextResponse("too much", 413)
        try:
            asked = msgspec.json.decode(body, type=Application)
        except msgspec.DecodeError as wrong:
            return PlainTextResponse(f"not an application: {wrong}\n", 400)
        try:
            admitted = await asyncio.to_thread(admit, asked)
        except Refused as refused:
            log.warning("a machine at %s was not let in: %s", request.client.host if request.client else "?", refused)
            return PlainTextResponse(f"{refused.what}\n{refused.cure}", 403)
        log.info("host %s joined, at %s port %d", admitted.host, asked.address, asked.port)
        return Response(msgspec.json.encode(admitted), media_type="application/json")

    def admit(asked: Application) -> Admission:
        by = credentials.authority()
        zones = admission.zone_names(config.regions, config.default_region)
        with database.transaction() as connection:
            made = admission.admit(connection, by, asked, zones, clock.now())
        return msgspec.structs.replace(made, settings=config.of_every_host())

    return Starlette(routes=[Route("/authority", authority), Route("/join", join, methods=["POST"])])


async def serve(config: Config, database: Database, credentials: Credentials, clock: Clock) -> None:
    """Answer machines that join until cancelled; returns at once where none can."""
    if not config.join_listen:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    while not await _certified(context, credentials, clock):
        await asyncio.sleep(AGAIN_SECONDS)
    try:
        listener = beside.listen(config.join_listen, config.join_port)
    except OSError as taken:
        log.error("no machine can join at %s port %d: %s", config.join_listen, config.join_port, taken)
        return
    async with beside.served(uvicorn.Config(application(config, database, credentials, clock), log_level="warning",
                                            access_log=False, http=Wire, server_header=False,
                                            timeout_graceful_shutdown=1), listener, context):
        while True:
            await asyncio.sleep(credentials.renewal_seconds)
            await _certified(context, credentials, clock)


async def _certified(context: ssl.SSLContext, credentials: Credentials, clock: Clock) -> bool:
    """Whether machines that join are shown a new certificate from now on."""
    try:
        await asyncio.to_thread(_certify, context, credentials, clock)
    except Exception:
        log.exception("the certificate that joining machines are shown could not be made")
        return False
    return True


def _certify(context: ssl.SSLContext, credentials: Credentials, clock: Clock) -> None:
    key = certificates.new_key()
    show(context, credentials.authority().certify_gate(key, clock.now()) + certificates.key_pem(key))


def url(config: Config) -> str:
    """Where a machine asks, as it will most likely reach this one."""
    everywhere = config.join_listen in ("0.0.0.0", "::")
    host = (next(iter(config.tls_names), "") or socket.getfqdn()) if everywhere else config.join_listen
    return f"https://{f'[{host}]' if ':' in host else host}:{config.join_port}"
