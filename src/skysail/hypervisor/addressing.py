"""A guest that runs takes on an IPv6 address, or lets go of one: its network configuration is written anew by its own agent.

Source: QEMU Guest Agent Protocol Reference, guest-exec; systemd.network(5); networkctl(1).
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from skysail.contract.document import Guest
from skysail.hypervisor.guest_agent import ANSWER_SECONDS, reach
from skysail.hypervisor.personality import Surroundings
from skysail.hypervisor.qmp import Gone, Refused

FILE = "/etc/systemd/network/10-skysail.network"
APPLY_SECONDS = 60.0
# Replaced by a rename. networkd leaves the addresses that a file had before (KeepConfiguration), so those go by hand, and the
# new ones come at once.
_SCRIPT = """set -e
test -e {file}
cat > {file}.skysail <<'END'
{text}END
chmod 644 {file}.skysail
mv {file}.skysail {file}
sync
networkctl reload
set +e
{steps}exit 0
"""


def network(guest: Guest, around: Surroundings) -> str:
    """The network configuration of a guest of ours, as its personaliser writes it at first."""
    ipv6 = around.ipv6(guest)
    text = (f"[Match]\nName=eth0\n\n[Network]\nAddress={guest.port.private_ipv4}/{around.prefix}\nGateway={around.gateway}\n"
            f"KeepConfiguration=static\nLinkLocalAddressing={'ipv6' if ipv6 else 'no'}\nIPv6AcceptRA=no\n")
    if ipv6:
        text += (f"\n[Address]\nAddress={ipv6}\nDuplicateAddressDetection=none\n"
                 f"\n[Route]\nGateway={around.gateway_ipv6}\nGatewayOnLink=yes\n")
    return text


def _script(guest: Guest, around: Surroundings, former: str) -> str:
    ipv6, route = around.ipv6(guest), f"default via {around.gateway_ipv6 or 'fe80::1'} dev eth0"
    steps = ""
    if former and former != ipv6:
        steps += f"ip -6 address del {former} dev eth0\n"
    if ipv6:
        steps += ("echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6\n"
                  f"ip -6 address replace {ipv6} dev eth0 nodad\nip -6 route replace {route} onlink\n")
    else:
        steps += f"ip -6 route del {route}\n"
    return _SCRIPT.format(file=FILE, text=network(guest, around), steps=steps)


async def tell(agent: Path, guest: Guest, around: Surroundings, former: str) -> bool:
    """Have the guest behind the socket ``agent`` go by its present configuration, in place of one with the IPv6 address
    ``former``; whether it does. One whose owner removed the agent, or keeps it from running programs, does not."""
    channel = await reach(agent)
    if channel is None:
        return False
    try:
        started = await channel.ask({"execute": "guest-exec", "arguments": {
            "path": "/bin/sh", "arg": ["-c", _script(guest, around, former)]}}, ANSWER_SECONDS)
        end = time.monotonic() + APPLY_SECONDS
        while time.monotonic() < end:
            seen = await channel.ask({"execute": "guest-exec-status", "arguments": {"pid": started["pid"]}}, ANSWER_SECONDS)
            if seen["exited"]:
                return bool(seen.get("exitcode") == 0)
            await asyncio.sleep(0.05)
    except (Gone, Refused, KeyError, TypeError):
        pass
    finally:
        channel.close()
    return False
