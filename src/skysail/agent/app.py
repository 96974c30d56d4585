"""The agent's face to its controller: a document in, reports out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from skysail.agent import logs
from skysail.agent.keeper import Keeper, StaleGeneration
from skysail.agent.ledger import MissingParts
from skysail.agent.samples import Sampler
from skysail.contract import VERSION
from skysail.contract.document import Delivery
from skysail.kit.errors import SkysailError


def application(keeper: Keeper, sampler: Sampler, log_folder: Path) -> Starlette:
    """PUT and GET /document, GET /report, /reports (a line of JSON per change), /samples, /inventory, /healthz,
    POST /prepare, and POST /images when others changed the images here."""

    async def put_document(request: Request) -> Response:
        try:
            delivery = msgspec.json.decode(await request.body(), type=Delivery)
        except msgspec.ValidationError as wrong:
            return PlainTextResponse(f"not a document: {wrong}", 400)
        if delivery.document.version != VERSION:
            return PlainTextResponse(f"contract {VERSION} is spoken here, not {delivery.document.version}", 400)
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

    return Starlette(lifespan=lifespan, routes=[
        Route("/document", put_document, methods=["PUT"]), Route("/document", document), Route("/report", report),
        Route("/reports", reports), Route("/samples", samples),
        Route("/inventory", inventory), Route("/prepare", prepare, methods=["POST"]),
        Route("/images", images, methods=["POST"]), Route("/healthz", healthz)])
