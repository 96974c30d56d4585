"""Alarms and contact methods: the rule itself, then boto3, a mail that arrives and a webhook that is called."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

import stores
from clouds import Cloud, eventually, running_cloud
from post_office import Hook, PostOffice, post_office
from skysail.api.tls import Certificates
from skysail.contract.samples import GuestSample, Sample
from skysail.inspect.verify import verify
from skysail.kit.clock import HandClock
from skysail.kit.config import Config
from skysail.notices import Notice, Undeliverable, webhook
from skysail.notices.smtp import Smtp
from skysail.notices.webhook import Webhook
from skysail.resources import alarms as alarm_rows
from skysail.resources import metering, outbox
from skysail.resources.alarm_state import evaluate
from skysail.resources.alarms import Alarms
from skysail.resources.request import Request
from skysail.serve.courier import Courier
from skysail.store.schema import deliveries
from test_samples import NOW, store

LINK = r"http\S+\?code=\S+"

# --- the rule

VALUES = st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=1, max_size=12)
RULE = {"comparison": "GreaterThanThreshold", "threshold": 50.0}


@given(VALUES, st.data())
def test_filling_gaps_never_contradicts_a_state_that_was_decided(values: list[float | None], data: st.DataObject) -> None:
    """What is said in spite of gaps stays true whatever they would have been; else it says that it cannot be known."""
    points = data.draw(st.integers(1, len(values)))
    said = evaluate(values, **RULE, datapoints_to_alarm=points, treat_missing_data="missing", state="OK")
    filled = [data.draw(st.floats(0, 100)) if value is None else value for value in values]
    whole = evaluate(filled, **RULE, datapoints_to_alarm=points, treat_missing_data="missing", state="OK")
    assert whole == ("ALARM" if sum(value > 50 for value in filled) >= points else "OK")
    assert said in (whole, "INSUFFICIENT_DATA")
    if None not in values:
        assert said == whole


@given(VALUES, st.data())
def test_missing_data_is_treated_as_asked(values: list[float | None], data: st.DataObject) -> None:
    points = data.draw(st.integers(1, len(values)))
    state: Any = data.draw(st.sampled_from(alarm_rows.STATES))

    def under(treatment: Any, seen: list[float | None] = values) -> str:
        return evaluate(seen, **RULE, datapoints_to_alarm=points, treat_missing_data=treatment, state=state)
    assert under("breaching") == under("missing", [100.0 if value is None else value for value in values])
    assert under("notBreaching") == under("missing", [0.0 if value is None else value for value in values])
    assert under("ignore") == (state if under("missing") == "INSUFFICIENT_DATA" else under("missing"))


@pytest.mark.parametrize(("comparison", "breaches"), [
    ("GreaterThanOrEqualToThreshold", [False, True, True]), ("GreaterThanThreshold", [False, False, True]),
    ("LessThanThreshold", [True, False, False]), ("LessThanOrEqualToThreshold", [True, True, False])])
def test_comparisons(comparison: str, breaches: list[bool]) -> None:
    assert [evaluate([value], comparison=comparison, threshold=50, datapoints_to_alarm=1, treat_missing_data="missing",
                     state="OK") == "ALARM" for value in (49, 50, 51)] == breaches


# --- what is measured moves alarms

def test_an_alarm_follows_what_is_measured(tmp_path: Path) -> None:
    database = store(tmp_path)

    class Hand:
        now = staticmethod(lambda: NOW)

    with database.transaction() as connection:
        Alarms(Hand()).put(connection, Request("1", "us-east-1", "PutAlarm", {
            "alarmName": "busy", "metricName": "CPUUtilization", "monitoredResourceName": "one", "threshold": 80,
            "comparisonOperator": "GreaterThanThreshold", "evaluationPeriods": 3, "datapointsToAlarm": 2}))

    def state(minute: int) -> str:
        with database.transaction() as connection:
            alarm_rows.follow(connection, NOW + 60 * minute + 30)
            return str(connection.exec_driver_sql("select state from alarms").scalar_one())

    def minute(number: int, percent: float) -> None:
        with database.transaction() as connection:
            metering.take_in(connection, {"h": [Sample(sequence=number + 1, at=NOW + 60 * number, guests=(
                GuestSample(id="g-1", condition="up", seconds=60, vcpus=1, cpu_seconds=0.6 * percent),))]})

    seen = []
    # Quiet, two busy periods, quiet ones, then silence.
    for period, percent in enumerate((10, 90, 90, 10, 10, None, None, None)):
        for number in range(5 * period, 5 * period + 5):
            if percent is not None:
                minute(number, percent)
        seen.append(state(5 * period + 5))
    assert seen == ["INSUFFICIENT_DATA", "INSUFFICIENT_DATA", "ALARM", "ALARM", "OK", "OK", "INSUFFICIENT_DATA",
                    "INSUFFICIENT_DATA"]
    # A period that is not over says nothing.
    minute(40, 100)
    assert state(41) == "INSUFFICIENT_DATA"
    database.close()


# --- from the outside

@pytest.fixture(scope="module")
def office() -> Iterator[PostOffice]:
    with post_office() as made:
        yield made


@pytest.fixture(scope="module")
def hook() -> Iterator[Hook]:
    made = Hook()
    yield made
    made.close()


@pytest.fixture
def alarmed(office: PostOffice, hook: Hook) -> Iterator[Cloud]:
    """A cloud with an instance and a relay."""
    with running_cloud(f'smtp_host = "127.0.0.1"\nsmtp_port = {office.port}\nmail_from = "cloud@example.org"\n'
                       f'webhooks = ["{hook.url}"]\nsample_seconds = 1\n') as cloud:
        client = cloud.client()
        eventually(lambda: client.get_blueprints()["blueprints"], 30)
        client.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId="debian_12",
                                bundleId="nano_3_0")
        yield cloud
        office.closed = False
        office.unknown.clear()
        office.mails.clear()
        hook.posts.clear()


def put(cloud: Cloud, name: str = "busy", **more: Any) -> dict[str, Any]:
    asked = {"metricName": "CPUUtilization", "monitoredResourceName": "one", "threshold": 80.0, "evaluationPeriods": 2,
             "comparisonOperator": "GreaterThanThreshold", "contactProtocols": ["Email"]}
    found: dict[str, Any] = cloud.client().put_alarm(alarmName=name, **asked | more)
    return found


def refused(call: Any, words: str, code: str = "InvalidInputException", **asked: Any) -> None:
    with pytest.raises(ClientError) as error:
        call(**asked)
    answer = error.value.response["Error"]
    assert answer["Code"] == code and words in answer["Message"], answer


def confirm(text: str) -> str:
    """Follow the link in a notice as a person does: open the page, press the button."""
    link = re.search(LINK, text)
    assert link is not None
    page = httpx.get(link[0]).raise_for_status().text
    code = re.search(r'value="([^"]+)"', page)
    assert code is not None
    return httpx.post(link[0].partition("?")[0], data={"code": code[1]}).raise_for_status().text


def status(cloud: Cloud) -> str:
    found: str = cloud.client().get_contact_methods()["contactMethods"][0]["status"]
    return found


def test_a_mail_is_verified_and_an_alarm_arrives(alarmed: Cloud, office: PostOffice) -> None:
    client = alarmed.client()
    (operation,) = client.create_contact_method(protocol="Email", contactEndpoint="me@example.org")["operations"]
    assert (operation["operationType"], operation["status"]) == ("CreateContactMethod", "Succeeded")
    put(alarmed, metricName="NetworkIn", treatMissingData="breaching", notificationTriggers=["ALARM", "OK"])
    # Nothing but the question goes to an address that is not verified.
    alarm = eventually(lambda: [found for found in client.get_alarms()["alarms"] if found["state"] == "ALARM"])[0]
    mail = eventually(lambda: office.mails)[0]
    assert (mail["To"], mail["From"], mail["Auto-Submitted"]) == ("me@example.org", "cloud@example.org", "auto-generated")
    assert status(alarmed) == "PendingVerification"
    httpx.get(re.search(LINK, mail.get_content())[0])  # type: ignore[index]
    assert status(alarmed) == "PendingVerification"
    assert "me@example.org" in confirm(mail.get_content())
    assert status(alarmed) == "Valid" and len(office.mails) == 1
    refused(client.send_contact_method_verification, "verified already", protocol="Email")

    assert (alarm["unit"], alarm["statistic"], alarm["period"]) == ("Bytes", "Sum", 300)
    assert alarm["monitoredResourceInfo"]["name"] == "one" and alarm["resourceType"] == "Alarm"
    # The gaps of this new instance are as good as not breaching now: the alarm is over, and says so.
    put(alarmed, metricName="NetworkIn", treatMissingData="notBreaching", notificationTriggers=["ALARM", "OK"])
    eventually(lambda: client.get_alarms(alarmName="busy")["alarms"][0]["state"] == "OK")
    told = eventually(lambda: office.mails[1:])[0]
    assert told["Subject"] == "OK: busy (NetworkIn of one)" and "no data" in told.get_content()
    client.test_alarm(alarmName="busy", state="ALARM")
    tested = eventually(lambda: office.mails[2:])[0]
    assert tested["Subject"].startswith("ALARM: busy") and "test" in tested.get_content()
    client.test_alarm(alarmName="busy", state="INSUFFICIENT_DATA")  # no trigger of this alarm
    put(alarmed, metricName="NetworkIn", treatMissingData="notBreaching", notificationEnabled=False)
    client.test_alarm(alarmName="busy", state="ALARM")

    assert eventually(lambda: verify(alarmed.config, 0.1) == [])
    client.delete_alarm(alarmName="busy")
    client.delete_contact_method(protocol="Email")
    assert not client.get_alarms()["alarms"] and not client.get_contact_methods()["contactMethods"]
    assert len(office.mails) == 3 and not _outbox(alarmed)
    assert httpx.post(f"http://127.0.0.1:{alarmed.port}/contact-method", data={"code": "guessed"}).status_code == 404


def _outbox(cloud: Cloud) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in stores.rows(
        cloud.config, "SELECT subject, attempts, error, due_at FROM deliveries")]


def test_a_notice_outlives_kill_9_and_a_relay_that_is_away(alarmed: Cloud, office: PostOffice) -> None:
    client = alarmed.client()
    office.closed = True
    client.create_contact_method(protocol="Email", contactEndpoint="me@example.org")
    eventually(lambda: _outbox(alarmed) and _outbox(alarmed)[0][1] > 0)
    assert "451" in _outbox(alarmed)[0][2] and not office.mails
    alarmed.kill("controller")
    office.closed = False
    alarmed.start("controller")
    mail = eventually(lambda: office.mails, 60)[0]
    confirm(mail.get_content())
    # Killed right behind the commit of what it shall tell.
    for number in range(3):
        put(alarmed, name=f"alarm-{number}", metricName=("CPUUtilization", "NetworkIn", "NetworkOut")[number])
        client.test_alarm(alarmName=f"alarm-{number}", state="ALARM")
        alarmed.kill("controller")
        alarmed.start("controller")
        subjects = eventually(lambda number=number: {
            mail["Subject"] for mail in office.mails if f"alarm-{number} " in mail["Subject"]})
        assert len(subjects) == 1
    eventually(lambda: not _outbox(alarmed))
    # One that was sent twice says by its id that it is the same.
    assert len({mail["Message-ID"] for mail in office.mails}) == 4


def test_a_receiver_that_does_not_exist_makes_its_contact_method_invalid(alarmed: Cloud, office: PostOffice) -> None:
    office.unknown.add("nobody@example.org")
    client = alarmed.client()
    client.create_contact_method(protocol="Email", contactEndpoint="nobody@example.org")
    eventually(lambda: status(alarmed) == "Invalid")
    assert "given up" in "".join(one.saw for one in verify(alarmed.config, 0.05))
    client.delete_contact_method(protocol="Email")
    assert verify(alarmed.config, 0.1) == []


def test_a_webhook_is_a_contact_too(alarmed: Cloud, hook: Hook) -> None:
    client = alarmed.client()
    hook.answer = 500
    client.create_contact_method(protocol="Email", contactEndpoint=f"{hook.url}/alarms")
    eventually(lambda: hook.posts)
    hook.answer = 204
    eventually(lambda: len(hook.posts) > 1)
    assert len({key for key, _ in hook.posts}) == 1 and hook.posts[0][1] == hook.posts[1][1]
    confirm(hook.posts[0][1]["body"])
    put(alarmed)
    client.test_alarm(alarmName="busy", state="ALARM")
    eventually(lambda: hook.posts[-1][1]["subject"].startswith("ALARM: busy"))


def test_what_cannot_be_is_refused_with_its_reason(alarmed: Cloud, cloud: Cloud) -> None:
    client = alarmed.client()
    create = client.create_contact_method
    refused(create, "SMS is not offered", protocol="SMS", contactEndpoint="+15550100")
    for endpoint in ("me", "me@", "a b@example.org", "me@example.org\r\nBcc: you@example.org", "<me@example.org>"):
        refused(create, "no mail address", protocol="Email", contactEndpoint=endpoint)
    for endpoint in ("http://169.254.169.254/", "http://127.0.0.1@example.org/", "http://"):
        refused(create, "not allowed", protocol="Email", contactEndpoint=endpoint)
    refused(cloud.client().create_contact_method, "no mail", protocol="Email", contactEndpoint="me@example.org")
    create(protocol="Email", contactEndpoint="me@example.org")
    refused(create, "already there", protocol="Email", contactEndpoint="you@example.org")
    refused(client.send_contact_method_verification, "less than a minute", protocol="Email")

    def wrong(words: str, code: str = "InvalidInputException", **more: Any) -> None:
        refused(lambda **asked: put(alarmed, **asked), words, code, **more)
    wrong("evaluationPeriods takes", evaluationPeriods=0)
    wrong("evaluationPeriods takes", evaluationPeriods=289)
    wrong("datapointsToAlarm takes", datapointsToAlarm=3)
    wrong("has ALARM", notificationTriggers=["OK"])
    wrong("SMS", contactProtocols=["Email", "SMS"])
    wrong("not measured", metricName="HealthyHostCount")
    wrong("does not exist", "NotFoundException", monitoredResourceName="nobody")
    wrong("already in use", name="one")
    for name in ("first", "second"):
        put(alarmed, name=name)
    wrong("at most 2 alarms", name="third")
    put(alarmed, name="second", threshold=90.0)
    assert [found["threshold"] for found in client.get_alarms(monitoredResourceName="one")["alarms"]] == [80, 90]
    refused(client.get_alarms, "does not exist", "NotFoundException", alarmName="nobody")
    # They go with what they watch.
    client.delete_instance(instanceName="one")
    assert not client.get_alarms()["alarms"]
    assert eventually(lambda: verify(alarmed.config, 0.1) == [])


def test_a_relay_that_wants_tls_and_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = Certificates(tmp_path)
    certificates.ensure(["localhost", "127.0.0.1"], time.time())
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(*certificates.server)
    (tmp_path / "password").write_text("open sesame\n")
    notice = Notice(id="1", endpoint="me@example.org", subject="Hej då", body="tõde\n.\n", at=1.0)
    with post_office(served, "open sesame") as office:
        config = Config(smtp_host="127.0.0.1", smtp_port=office.port, mail_from="cloud@example.org", smtp_user="cloud",
                        smtp_security="starttls", smtp_password_file=str(tmp_path / "password"))
        with pytest.raises(Undeliverable, match="CERTIFICATE_VERIFY_FAILED"):  # nobody vouches for it
            Smtp(config).send(notice)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        Smtp(config).send(notice)
        (mail,) = office.mails
        assert (mail["Subject"], mail["Message-ID"]) == ("Hej då", "<1@example.org>")
        assert mail.get_content().splitlines() == ["tõde", "."]
        (tmp_path / "password").write_text("guess")
        with pytest.raises(Undeliverable, match="535") as wrong:
            Smtp(config).send(notice)
        assert not wrong.value.final
    with pytest.raises(Undeliverable):
        Smtp(config).send(notice)
    with pytest.raises(ValueError, match="in the clear"):
        Config(smtp_host="x", mail_from="a@b", smtp_user="me")


def test_receivers_that_do_not_answer_hold_up_nobody_else(tmp_path: Path) -> None:
    go = threading.Event()

    class Slow:
        def send(self, _notice: Notice) -> None:
            assert go.wait(60)

    database, clock = store(tmp_path), HandClock(NOW)
    with database.transaction() as connection:
        for number in range(outbox.PORTION):
            outbox.put(connection, {"id": f"c-{number}", "endpoint": "me@example.org"}, "s", "b",  # type: ignore[arg-type]
                       clock.now())

    async def story() -> None:
        work = asyncio.create_task(Courier(database, clock, Slow(), Slow()).deliver())
        await asyncio.sleep(0.5)
        async with asyncio.timeout(30):
            assert await asyncio.gather(*(asyncio.to_thread(lambda: 1) for _ in range(10))) == [1] * 10
        assert not work.done()
        go.set()
        await work
    asyncio.run(story())
    database.close()


def test_a_webhook_that_answers_a_byte_at_a_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        def drip() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as taken:
                for byte in itertools.chain(b"HTTP/1.1 200 OK\r\nX: ", itertools.repeat(0x61)):
                    taken.sendall(bytes((byte,)))
                    time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(Undeliverable, match="did not answer within 1 s"):
            Webhook().send(Notice(id="1", endpoint=f"http://127.0.0.1:{server.getsockname()[1]}", subject="s", body="b",
                                  at=1.0))
        thread.join(30)
        assert not thread.is_alive()


def test_a_courier_gives_up_after_days_and_not_before(tmp_path: Path) -> None:
    class Away:
        sent = 0

        def send(self, _notice: Notice) -> None:
            self.sent += 1
            raise Undeliverable("away")

    database, clock, away = store(tmp_path), HandClock(NOW), Away()
    with database.transaction() as connection:
        outbox.put(connection, {"id": "c-1", "endpoint": "me@example.org"}, "s", "b", clock.now())  # type: ignore[arg-type]
    courier = Courier(database, clock, away, away)
    for _ in range(5 * 86400 // 600):
        asyncio.run(courier.deliver())
        clock.advance(600)
    with database.transaction(write=False) as connection:
        (row,) = connection.execute(select(deliveries)).all()
    assert row.due_at is None and row.attempts == away.sent
    assert 4 * 24 - 1 <= away.sent <= 4 * 24 + 8
    database.close()
