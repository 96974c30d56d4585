"""The agent's face to its controller: a document in, reports out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from skysail import contract
from skysail.agent import logs
from skysail.agent.identity import Identity
from skysail.agent.keeper import Keeper, StaleGeneration
from skysail.agent.ledger import MissingParts
from skysail.agent.samples import Sampler
from skysail.contract.document import Delivery
from skysail.contract.facts import HostFacts
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread


class _Version(msgspec.Struct, frozen=True, kw_only=True):
    version: int


class _Versioned(msgspec.Struct, frozen=True, kw_only=True):
    """As much of a delivery as every version of the contract has."""

    document: _Version


def application(keeper: Keeper, sampler: Sampler, log_folder: Path, facts: Callable[[], HostFacts],
                identity: Identity | None = None, callers: Callable[[], int] = lambda: 0) -> Starlette:
    """PUT and GET /document, GET /facts, /report, /reports (a line of JSON per change), /samples, /inventory, /healthz,
    POST /prepare, and POST /images when others changed the images here; with an ``identity`` also POST /certificate, which
    answers with a request for one, and PUT. GET /callers says how many connections of controllers on other machines there
    are."""

    async def put_document(request: Request) -> Response:
        body = await request.body()
        try:
            # Its version first: what another one wrote need not be a document to us.
            version = msgspec.json.decode(body, type=_Versioned).document.version
            if contract.common(version) is None:
                return PlainTextResponse(f"contract {contract.VERSION} is spoken here, not {version}", 400)
            delivery = msgspec.json.decode(body, type=Delivery)
        except msgspec.DecodeError as wrong:
            return PlainTextResponse(f"not a document: {wrong}", 400)
        if delivery.document.host != keeper.host:
            return PlainTextResponse(f"this is host {keeper.host}, not {delivery.document.host}", 421)
        try:
            await keeper.accept(delivery.document, {digest: bytes(part) for digest, part in delivery.parts.items()})
        except StaleGeneration as stale:
            return PlainTextResponse(str(stale), 409)
        except MissingParts as missing:
            return Response(msgspec.json.encode(missing.digests), 428, media_type="application/json")
        except ValueError as wrong:
            return PlainTextResponse(f"not a document: {wrong}", 400)
        return Response(status_code=204)

    async def document(_request: Request) -> Response:
        return Response(msgspec.json.encode(await asyncio.to_thread(keeper.document)), media_type="application/json")

    async def tell_facts(_request: Request) -> Response:
        told = await in_thread(facts)
        if identity is not None:
            told = msgspec.structs.replace(told, certificate_until=await in_thread(lambda: identity.until))
        return Response(msgspec.json.encode(told), media_type="application/json")

    async def ask_for_certificate(_request: Request) -> Response:
        assert identity is not None
        return Response(await in_thread(identity.request), media_type="application/x-pem-file")

    async def take_certificate(request: Request) -> Response:
        assert identity is not None
        try:
            await in_thread(identity.take, await request.body())
        except SkysailError as refused:
            return PlainTextResponse(refused.what, 409)
        return Response(status_code=204)

    async def report(_request: Request) -> Response:
        return Response(msgspec.json.encode(keeper.report()), media_type="application/json")

    async def reports(_request: Request) -> Response:
        async def lines() -> AsyncIterator[bytes]:
            async for report in keeper.reports():
                yield (msgspec.json.encode(report) if report is not None else b"{}") + b"\n"
        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def samples(request: Request) -> Response:
        try:
            after = int(request.query_params.get("after", "0"))
        except ValueError:
            return PlainTextResponse("after is the number of a sample", 400)
        return Response(msgspec.json.encode(sampler.page(request.query_params.get("ring", ""), after)),
                        media_type="application/json")

    async def inventory(_request: Request) -> Response:
        return Response(msgspec.json.encode(await keeper.inventory()), media_type="application/json")

    async def prepare(request: Request) -> Response:
        try:
            await keeper.prepare(request.query_params["image"], int(request.query_params["vcpus"]))
        except SkysailError as failed:
            return PlainTextResponse(f"{failed.what}\n{failed.cure}", 500)
        return Response(status_code=204)

    async def images(_request: Request) -> Response:
        await keeper.recount()
        return Response(status_code=204)

    async def tell_callers(_request: Request) -> Response:
        return PlainTextResponse(str(callers()))

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok")

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await keeper.start()
        tasks = [asyncio.create_task(work) for work in (keeper.follow(), keeper.tend_network(), keeper.flatten(),
                                                          keeper.zones.run(), keeper.entrance.run(),
                                                          keeper.metadata.run(), sampler.run(), logs.tend(log_folder))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await keeper.metadata.close()

    certificates = [Route("/certificate", ask_for_certificate, methods=["POST"]),
                    Route("/certificate", take_certificate, methods=["PUT"])] if identity is not None else []
    return Starlette(lifespan=lifespan, routes=[
        *certificates,
        Route("/document", put_document, methods=["PUT"]), Route("/document", document),
        Route("/callers", tell_callers),
        Route("/facts", tell_facts), Route("/report", report), Route("/reports", reports), Route("/samples", samples),
        Route("/inventory", inventory), Route("/prepare", prepare, methods=["POST"]),
        Route("/images", images, methods=["POST"]), Route("/healthz", healthz)])
