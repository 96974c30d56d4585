"""Webhooks: a notice as JSON, by POST. Any answer of 2xx takes it over; redirects are not followed."""

from __future__ import annotations

import asyncio

import httpx

from skysail.notices import Notice, Undeliverable

# For all of it: httpx's own are for each read, and one that answers a byte at a time would never end.
TIMEOUT_SECONDS = 15.0


class Webhook:
    """Posts ``{"id", "subject", "body", "at"}``; the id is the Idempotency-Key too."""

    def send(self, notice: Notice) -> None:
        try:
            status = asyncio.run(self._post(notice))
        except TimeoutError as slow:
            raise Undeliverable(f"{notice.endpoint} did not answer within {TIMEOUT_SECONDS:.0f} s"[:500]) from slow
        except (httpx.HTTPError, httpx.InvalidURL) as failed:
            raise Undeliverable(f"{notice.endpoint} could not be reached: {failed}"[:500]) from failed
        if not httpx.codes.is_success(status):
            raise Undeliverable(f"{notice.endpoint} answered {status}")

    async def _post(self, notice: Notice) -> int:
        """The status of the answer; what else it says nobody reads."""
        async with (asyncio.timeout(TIMEOUT_SECONDS), httpx.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False) as client,
                    client.stream("POST", notice.endpoint, follow_redirects=False, headers={"Idempotency-Key": notice.id},
                                  json={"id": notice.id, "subject": notice.subject, "body": notice.body,
                                        "at": notice.at}) as answer):
            return answer.status_code
