"""Make this machine a host of a cloud that a controller on another machine runs; may be repeated."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import msgspec
from cryptography import x509

from skysail.contract.identity import CONTROLLER, host_name
from skysail.hosts.admission import NAME, Admission, Application, Token
from skysail.kit import certificates, durable, process
from skysail.kit.config import CLOUD_SETTINGS, Config, load
from skysail.kit.errors import SkysailError
from skysail.serve import membership, processes, programs, up
from skysail.serve.facts import Facts
from skysail.serve.membership import Membership

AGENT_PORT = 8703
REACHED_SECONDS = 180.0


def join(config: Config, url: str, token: str, progress: Callable[[str], None], *, name: str = "", zone: str = "",
         address: str = "", port: int = AGENT_PORT) -> Membership:
    """Become a host of the cloud whose controller is at ``url``: get a certificate, make what guests need, start the agent,
    and wait until the controller has reached it. Needs root. Raises :class:`SkysailError`; what was done until then is not
    done again when this is repeated."""
    process.require_root()
    shown = Token.parse(token)
    held = belongs(config, shown)
    up.require_disk(config)
    if held is None:
        name = name or socket.gethostname().partition(".")[0].lower()
        if not NAME.fullmatch(name):
            raise SkysailError(f"{name!r} is no name for a host", "join with --name, in small letters, digits and hyphens")
        progress("looking at this machine")
        facts = Facts(config, name).tell()
        progress(f"asking {url} to be let in")
        gate = Gate(url, shown)
        own, address = membership.identity(config), address or gate.own_address()
        admitted = gate.apply(Application(
            token=shown.id, secret=shown.secret, name=name, zone=zone, address=address, port=port,
            request=own.repeat().decode(), facts=msgspec.structs.replace(facts, underlay=facts.underlay or address)))
        held = Membership(host=admitted.host, address=address, port=port, token=shown.id, identity=admitted.identity)
        programs.stop(config, "agent")  # one of an earlier membership; guests run on
        durable.replace(config.root / CLOUD_SETTINGS, msgspec.json.encode(admitted.settings), 0o644)
        membership.keep(config, held)
        # Last: with a certificate this machine is a host, and all else that it needs to be one is there.
        own.begin(admitted.identity, admitted.certificate.encode(), gate.authority)
        progress(f"this machine is {admitted.host}, in {', '.join(admitted.zones)}")
    config = load(config.data)
    up.up(config, progress)
    progress("waiting for the controller to call")
    if not processes.wait_until(lambda: reached(config), REACHED_SECONDS, 0.2):
        raise SkysailError(f"no controller called this machine at {held.address}, port {held.port}, within "
                           f"{REACHED_SECONDS:.0f} s", "let the controller through to that port; where it is to call "
                           f"another address, make a token with: sudo ./skysail host token --host {held.host}, and join with "
                           f"that and --address; see {programs.agent_log(config)}")
    return held


def belongs(config: Config, token: Token) -> Membership | None:
    """What this machine is in the cloud of the token, by that token; None when it has not joined one, or is to join anew.
    Raises SkysailError when it is part of another."""
    if config.database or config.sqlite_file.exists():
        raise SkysailError("this machine runs a cloud of its own", "join with a machine that does not, or set SKYSAIL_DATA")
    held, own = membership.find(config), membership.identity(config)
    if held is None or not own.whole:
        return None
    if certificates.fingerprint(x509.load_pem_x509_certificate(own.authority)) != token.authority:
        raise SkysailError(f"this machine is {held.host} of another cloud",
                           f"remove it there, end its guests, move {config.data} away, then join again")
    # Another token makes it another host, or the same one anew; so does a certificate that no controller calls any more. One
    # that is not for what we became last was on its way when this broke off.
    anew = held.token not in ("", token.id) or own.expired or (held.identity and own.name != host_name(held.identity))
    return None if anew else held


def reached(config: Config) -> bool:
    """Whether a controller has given this machine its document, and is there: a document may be of a former membership."""
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(config.agent_socket)), timeout=10) as client:
            return client.get("http://agent/document").content != b"null" and client.get("http://agent/callers").text != "0"
    except httpx.HTTPError:
        return False


class Gate:
    """The controller's listener for machines that join. It is known by the authority that the token names: nothing is said to
    anybody else."""

    def __init__(self, url: str, token: Token) -> None:
        """Raises SkysailError when nobody answers there, or somebody else."""
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.port is None:
            raise SkysailError(f"{url} is no address of a controller", "it is like https://192.0.2.1:8702")
        self._place = parts.hostname, parts.port
        self._url = f"https://{parts.netloc}"
        self.authority = self._ask_authority(token.authority)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self.authority.decode())
        self._context = context

    def _ask_authority(self, fingerprint: str) -> bytes:
        # Whom we ask is not known yet. What is answered is taken only if it is what the token names.
        anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
        try:
            answer = httpx.get(f"{self._url}/authority", verify=anybody, timeout=20, trust_env=False)
            found = x509.load_pem_x509_certificate(answer.content)
        except httpx.HTTPError as silent:
            raise SkysailError(f"nobody answers at {self._url}: {silent}", "see that this machine reaches that address, and "
                               "that join_listen is set in the controller's skysail.toml") from silent
        except ValueError as strange:
            raise SkysailError(f"who answers at {self._url} is no controller of Skysail", "check the address") from strange
        if certificates.fingerprint(found) != fingerprint:
            raise SkysailError(f"who answers at {self._url} is not the controller that made this token",
                               "check the address; if it is right, somebody stands between this machine and the controller")
        return certificates.pem(found)

    def apply(self, application: Application) -> Admission:
        """Ask to be let in. Raises SkysailError with the controller's words."""
        try:
            answer = httpx.Client(verify=self._context, timeout=60, trust_env=False).post(
                f"{self._url}/join", content=msgspec.json.encode(application), extensions={"sni_hostname": CONTROLLER})
        except httpx.HTTPError as broken:
            raise SkysailError(f"the controller at {self._url} did not answer: {broken}",
                               "run this again, with the same token") from broken
        if answer.status_code != 200:
            what, _, cure = answer.text.partition("\n")
            raise SkysailError(f"the controller did not let this machine in: {what}", cure)
        return msgspec.json.decode(answer.content, type=Admission)

    def own_address(self) -> str:
        """The address by which this machine reaches the controller, which most likely reaches it there too."""
        family, kind, number, _, place = socket.getaddrinfo(*self._place, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
