"""A boot that hangs because a processor's timer was lost is reset; one that is only slow is left alone."""

from __future__ import annotations

import pytest

from clouds import RealCloud, eventually
from crashing import guest_of, state
from skysail.hypervisor.boot import lost_its_timer

COMPLAINT = "rcu: rcu_preempt kthread timer wakeup didn't happen for 7003 jiffies! g-1159 f0x0 RCU_GP_WAIT_FQS(5)"
# What a kernel that lost a timer leaves: its complaint, and a boot that goes no further. Only the first boot with it hangs.
HANGS = f"""
sudo tee /etc/systemd/system/hangs.service > /dev/null <<'END'
[Unit]
DefaultDependencies=no
After=systemd-remount-fs.service
Before=sysinit.target
ConditionPathExists=!/var/lib/hung
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/sh -c 'touch /var/lib/hung; sync; echo "<3>$COMPLAINT" > /dev/kmsg; exec sleep infinity'
Environment="COMPLAINT={COMPLAINT}"
[Install]
WantedBy=sysinit.target
END
sudo systemctl enable hangs.service && sync
"""


def test_only_the_last_boot_counts() -> None:
    began, slow = b"[    0.000000] Linux version 6.1.0-40-amd64\n", b"rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:\n"
    lost = f"[   37.104]  {COMPLAINT}\n".encode()
    assert lost_its_timer(began + slow + lost) and lost_its_timer(lost), "the beginning may lie before what is kept"
    assert not lost_its_timer(began + slow) and not lost_its_timer(began + lost + began + slow)


@pytest.mark.real
@pytest.mark.long
def test_a_boot_that_lost_a_timer_is_reset_once(own_real_cloud: RealCloud) -> None:
    cloud = own_real_cloud
    cloud.launch("hangs")
    cloud.ssh("hangs", HANGS)
    client, log = cloud.client(), cloud.config.guests_dir / guest_of(cloud, "hangs") / "run" / "serial.log"
    client.stop_instance(instanceName="hangs")
    eventually(lambda: state(cloud, "hangs") == "stopped", 300, "it is off")
    began = log.stat().st_size
    client.start_instance(instanceName="hangs")
    eventually(lambda: state(cloud, "hangs") == "running", 900, "it runs")
    assert cloud.ssh("hangs", "ls /var/lib/hung").strip() == "/var/lib/hung"
    said = log.read_bytes()[began:].decode(errors="replace")
    assert said.count("Linux version ") == 2 and said.count(COMPLAINT) == 1, said[-4000:]
