"""Webhooks: a notice as JSON, by POST. Any answer of 2xx takes it over; redirects are not followed."""

from __future__ import annotations

import httpx

from skysail.notices import Notice, Undeliverable

TIMEOUT_SECONDS = 15.0


class Webhook:
    """Posts ``{"id", "subject", "body", "at"}``; the id is the Idempotency-Key too."""

    def send(self, notice: Notice) -> None:
        try:
            answer = httpx.post(notice.endpoint, timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=False,
                                headers={"Idempotency-Key": notice.id},
                                json={"id": notice.id, "subject": notice.subject, "body": notice.body, "at": notice.at})
        except (httpx.HTTPError, httpx.InvalidURL) as failed:
            raise Undeliverable(f"{notice.endpoint} could not be reached: {failed}"[:500]) from failed
        if not answer.is_success:
            raise Undeliverable(f"{notice.endpoint} answered {answer.status_code}")
