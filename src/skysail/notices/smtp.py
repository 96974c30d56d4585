"""Mail through the operator's relay (RFC 5321). The relay takes a mail over with its answer to DATA; what it does with it
then is the relay's. The Message-ID follows from the notice (RFC 5322, 3.6.4): a mail sent twice is known as one."""

from __future__ import annotations

import smtplib
import ssl
import textwrap
from email.message import EmailMessage
from email.utils import formatdate
from pathlib import Path

from skysail.kit.config import Config
from skysail.notices import Notice, Undeliverable

TIMEOUT_SECONDS = 30.0
LINE_LETTERS = 76


class Smtp:
    """The relay that the configuration names. Its password is read anew for each mail, so that it may be changed."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def send(self, notice: Notice) -> None:
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = self._config.mail_from, notice.endpoint, notice.subject
        mail["Date"] = formatdate(notice.at)
        mail["Message-ID"] = f"<{notice.id}@{self._config.mail_from.rpartition('@')[2]}>"
        mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's absence assistant answers
        # Longer lines would be sent encoded (RFC 5322, 2.1.1), and the links among them not be there for everyone to read.
        mail.set_content("\n".join(textwrap.fill(line, LINE_LETTERS, break_long_words=False, break_on_hyphens=False)
                                   for line in notice.body.splitlines()) + "\n")
        try:
            with self._connect() as relay:
                relay.send_message(mail, self._config.mail_from, [notice.endpoint])
        except smtplib.SMTPRecipientsRefused as refused:
            (code, said), *_ = refused.recipients.values()
            raise Undeliverable(f"{notice.endpoint} was refused: {code} {_text(said)}", final=code >= 500) from refused
        except (smtplib.SMTPException, OSError, ValueError) as failed:
            raise Undeliverable(f"{self._config.smtp_host} did not take the mail: {failed}"[:500]) from failed

    def _connect(self) -> smtplib.SMTP:
        config = self._config
        if config.smtp_security == "tls":
            relay: smtplib.SMTP = smtplib.SMTP_SSL(config.smtp_host, config.smtp_port, timeout=TIMEOUT_SECONDS,
                                                   context=ssl.create_default_context())
        else:
            relay = smtplib.SMTP(config.smtp_host, config.smtp_port, timeout=TIMEOUT_SECONDS)
        try:
            if config.smtp_security == "starttls":
                relay.starttls(context=ssl.create_default_context())
            if config.smtp_user:
                relay.login(config.smtp_user, Path(config.smtp_password_file).read_text().strip())
        except BaseException:
            relay.close()
            raise
        return relay


def _text(said: bytes | str) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said
