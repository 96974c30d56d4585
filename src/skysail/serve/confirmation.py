"""The page that a verification leads to. Opening it changes nothing, for programs that look through mail open it too."""

from __future__ import annotations

import asyncio
import html
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from skysail.resources import contact_methods
from skysail.store.database import Database

PATH = "/contact-method"
MAX_FORM_BYTES = 1024


def routes(database: Database) -> list[Route]:
    """GET asks to confirm the code in its query, POST confirms the one in its form."""

    def verify(code: str) -> str:
        with database.transaction() as connection:
            return contact_methods.verify(connection, code)

    async def ask(request: Request) -> Response:
        code = html.escape(request.query_params.get("code", ""), quote=True)
        return _page(200, f'<form method="post" action="{PATH}"><input type="hidden" name="code" value="{code}">'
                          '<p>Notices of alarms shall come to you?</p><button>Yes, this address is mine</button></form>')

    async def confirm(request: Request) -> Response:
        form = parse_qs((await request.body())[:MAX_FORM_BYTES].decode(errors="replace"))
        endpoint = await asyncio.to_thread(verify, form.get("code", [""])[0])
        if not endpoint:
            return _page(404, "<p>This code is not good, or not any more.</p>")
        return _page(200, f"<p>{html.escape(endpoint)} is verified.</p>")

    return [Route(PATH, ask, methods=["GET"]), Route(PATH, confirm, methods=["POST"])]


def _page(status: int, body: str) -> Response:
    return HTMLResponse(f"<!doctype html><meta charset=utf-8><title>Skysail</title>{body}", status,
                        headers={"Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
                                 "Content-Security-Policy": "default-src 'none'; form-action 'self'"})
