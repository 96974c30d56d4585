"""The first boot: launch scripts in every form, and a foreign image that boots cold beside a clone of our own."""

from __future__ import annotations

import hashlib
import http.server
import re
import subprocess
import threading
from collections.abc import Iterator
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from functools import partial
from pathlib import Path

import pytest

from clouds import RealCloud, eventually
from skysail.images.library import Library

# cloud-init is a dozen Python programs: 20 s in a guest on an idle machine, many minutes on a busy one.
pytestmark = [pytest.mark.real, pytest.mark.timeout(5400)]
PATIENCE_SECONDS = 1800
# Each appends a line per run, so that a second run shows.
RUN = "echo said-by-$(id -un) | tee -a /root/runs\n"
FORMS = {
    "script": "#!/bin/sh\n" + RUN,
    "commands": RUN + "exit 7\n",  # and a failure is the script's own affair
    "config": "#cloud-config\nwrite_files:\n- {path: /root/written, content: by-config}\nhostname: renamed\n"
              f"runcmd:\n- [sh, -c, '{RUN.strip()}']\n",
}


def multipart() -> str:
    """Two parts, as `cloud-init devel make-mime` writes them."""
    whole = MIMEMultipart()
    whole.attach(MIMEText("#!/bin/sh\n" + RUN, "x-shellscript"))
    whole.attach(MIMEText("#cloud-config\nwrite_files:\n- {path: /root/written, content: by-part}\n", "cloud-config"))
    return whole.as_string()


def runs(cloud: RealCloud, name: str) -> str:
    """How often the launch script ran, once cloud-init has come to its end."""
    def ended() -> str | None:
        told = cloud.ssh(name, "test -e /run/cloud-init/result.json && sudo cat /root/runs || echo not yet", PATIENCE_SECONDS)
        return told if "not yet" not in told else None
    answer: str = eventually(ended, PATIENCE_SECONDS, f"the launch script of {name} ran")
    return answer


@pytest.mark.parametrize("names", [("script", "multipart"), pytest.param(("config", "commands"), marks=pytest.mark.long)])
def test_launch_scripts_run_once_as_root(real_cloud: RealCloud, names: tuple[str, str]) -> None:
    known = {**FORMS, "multipart": multipart()}
    forms = {name: known[name] for name in names}
    for form, text in forms.items():
        (made,) = real_cloud.launch(form, userData=text)
        assert made["state"]["name"] == "running"
    try:
        for form in forms:
            assert runs(real_cloud, form) == "said-by-root\n", form
            assert "said-by-root" in real_cloud.ssh(form, "sudo cat /var/log/cloud-init-output.log")
        wrote = {"config": ["by-config", "renamed"], "multipart": ["by-part", "multipart"]}
        for form in wrote.keys() & forms:
            assert real_cloud.ssh(form, "sudo cat /root/written; echo; hostname").split() == wrote[form]
        before = {form: real_cloud.ssh(form, "cat /proc/sys/kernel/random/boot_id") for form in forms}
        client = real_cloud.client()
        for form in {"script", "config"} & forms.keys():
            real_cloud.settled(client.reboot_instance(instanceName=form)["operations"][0]["id"], PATIENCE_SECONDS)
        for form in {"commands", "multipart"} & forms.keys():
            real_cloud.settled(client.stop_instance(instanceName=form)["operations"][0]["id"], PATIENCE_SECONDS)
            real_cloud.settled(client.start_instance(instanceName=form)["operations"][0]["id"], PATIENCE_SECONDS)
        for form in forms:
            def later(form: str = form) -> bool:
                return real_cloud.ssh(form, "cat /proc/sys/kernel/random/boot_id", PATIENCE_SECONDS) != before[form]
            eventually(later, PATIENCE_SECONDS, f"{form} has booted")
            assert runs(real_cloud, form) == "said-by-root\n", form
        for form, name in {"script": "script", "config": "renamed"}.items():
            assert form not in forms or real_cloud.ssh(form, "hostname").strip() == name
    finally:
        real_cloud.delete(*forms)


# What is ours in a disk of ours: without it, it is any Debian with a stock cloud-init.
OURS = ("/etc/cloud/cloud.cfg.d/95_skysail.cfg", "/usr/lib/skysail/personalise.py", "/etc/ssh/skysail_user_ca.pub",
        "/usr/lib/systemd/system/skysail-personalise.service", "/usr/lib/systemd/system/skysail-host-key.service",
        "/etc/systemd/system/multi-user.target.wants/skysail-host-key.service", "/usr/lib/udev/rules.d/60-skysail.rules",
        "/usr/lib/systemd/system/skysail-identity.service",
        "/etc/systemd/system/multi-user.target.wants/skysail-identity.service",
        "/etc/ssh/sshd_config.d/10-skysail.conf", "/etc/sudoers.d/90-admin")


@pytest.fixture
def foreign(real_cloud: RealCloud, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address and the sha256 of an image that knows nothing of us, served by HTTP."""
    library = Library(real_cloud.config.images_dir)
    held = library.latest("debian_12")
    assert held is not None
    raw, served = tmp_path / "disk.raw", tmp_path / "foreign.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", library.path(held.digest), raw], check=True)
    own = tmp_path / "own.cfg"
    own.write_text("locale: C.UTF-8\n")  # the packages behind a stock cloud.cfg's en_US are not in an image this small
    orders = "".join(f"rm {path}\n" for path in OURS) + f"write {own} /etc/cloud/cloud.cfg.d/90_own.cfg\n"
    subprocess.run(["debugfs", "-w", "-f", "-", f"{raw}?offset=1048576"], input=orders.encode(), check=True,
                   capture_output=True)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, served], check=True)
    raw.unlink()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *words: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with served.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # As a publisher shows it, too.
        (tmp_path / "ubuntu-24.04-server-cloudimg-amd64.img").hardlink_to(served)
        (tmp_path / "SHA256SUMS").write_text(f"{digest} *ubuntu-24.04-server-cloudimg-amd64.img\n")
        yield f"http://127.0.0.1:{server.server_address[1]}/foreign.qcow2", digest
        server.shutdown()
    for one in library.list():
        if one.blueprint in ("foreign", "ubuntu_24_04"):
            library.path(one.digest).with_suffix(".json").unlink()
            library.path(one.digest).unlink()


LOOK = r"""sudo sh -c '
echo hostname=$(hostname)
echo kept_hostname=$(cat /etc/hostname)
echo address=$(ip -4 -o address show scope global | sed "s/.*inet \([0-9./]*\).*/\1/")
echo gateway=$(ip -4 route show default | cut -d" " -f3)
echo resolvers=$(grep ^nameserver /etc/resolv.conf | sort | tr "\n" ,)
echo host_keys=$(cut -d" " -f1,2 /etc/ssh/ssh_host_*_key.pub | tr "\n" ,)
echo authority=$(cat /etc/ssh/skysail_user_ca.pub)
echo trusts=$(sshd -T 2>/dev/null | grep -i trustedusercakeys)
echo password_login=$(sshd -T 2>/dev/null | grep -i ^passwordauthentication)
echo keys=$(cat /home/$SUDO_USER/.ssh/authorized_keys)
echo user=$SUDO_USER
echo memory=$(($(grep MemTotal /proc/meminfo | tr -dc 0-9) >> 15))
echo disk=$(($(df -B1 --output=size / | tail -1) >> 30))
echo processors=$(nproc)
echo written=$(cat /root/written)
echo machine_id=$(cat /etc/machine-id)
echo failed=$(systemctl --failed --plain --no-legend | tr "\n" ,)
'"""
# Uses the very keys of cloud-config that a seed could use for itself: the owner's must not push ours out.
DATA = """#cloud-config
write_files:
- {path: /root/written, content: by-the-owner}
ssh_authorized_keys: [ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f more]
runcmd:
- [sh, -c, 'echo said-by-$(id -un) >> /root/runs']
"""


@pytest.mark.long
def test_a_foreign_image_boots_cold_into_the_state_of_a_clone(real_cloud: RealCloud, foreign: tuple[str, str]) -> None:
    address, sha256 = foreign
    wrong = real_cloud.operator("images", "import", address, "--sha256", "0" * 64, "--blueprint", "foreign")
    assert wrong.returncode == 1 and "checksum" in wrong.stderr
    done = real_cloud.operator("images", "import", address, "--sha256", sha256, "--blueprint", "foreign", "--name",
                               "Somebody's Debian", "--user", "captain")
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in real_cloud.operator("images", "list").stdout.splitlines() if line.startswith("foreign")]
    assert "boots cold" in row
    (clone,) = real_cloud.launch("warm", userData=DATA)
    (cold,) = real_cloud.launch("cold", blueprint="foreign", userData=DATA)
    assert (cold["blueprintName"], cold["username"]) == ("Somebody's Debian", "captain")
    try:
        seen: dict[str, dict[str, str]] = {}
        for name, instance in (("warm", clone), ("cold", cold)):
            assert runs_of(real_cloud, name) == "said-by-root\n"
            shown = real_cloud.ssh(name, LOOK, PATIENCE_SECONDS)
            told = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
            access = real_cloud.client().get_instance_access_details(instanceName=name)["accessDetails"]
            (key,) = access["hostKeys"]
            assert told.pop("host_keys").strip(",") == f"{key['algorithm']} {key['publicKey']}"
            assert (told.pop("hostname"), told.pop("kept_hostname"), told.pop("user")) == (name, name, instance["username"])
            length = real_cloud.config.private_network.partition("/")[2]
            assert told.pop("address") == f"{instance['privateIpAddress']}/{length}"
            assert re.fullmatch("[0-9a-f]{32}", told["machine_id"])
            seen[name] = told
        # The one thing that differs: a clone is told its machine-id, a cold boot makes its own.
        assert seen["warm"].pop("machine_id") == real_cloud.guest("warm")[1]["identity"]["machine_id"]
        kept = seen["cold"].pop("machine_id")
        for told in seen.values():
            told["keys"] = " ".join(sorted(set(re.findall(r"ssh-\S+ (AAAA\S+)", told["keys"]))))
        assert len(seen["warm"]["keys"].split()) == 2
        assert seen["warm"] == seen["cold"]
        client = real_cloud.client()
        real_cloud.settled(client.stop_instance(instanceName="cold")["operations"][0]["id"], PATIENCE_SECONDS)
        real_cloud.settled(client.start_instance(instanceName="cold")["operations"][0]["id"], PATIENCE_SECONDS)
        assert real_cloud.ssh("cold", "cat /etc/machine-id", PATIENCE_SECONDS).strip() == kept
        assert runs_of(real_cloud, "cold") == "said-by-root\n"
    finally:
        real_cloud.delete("warm", "cold")


@pytest.mark.long
def test_an_image_is_imported_by_its_name(real_cloud: RealCloud, foreign: tuple[str, str]) -> None:
    address, sha256 = foreign
    mirror = address.rpartition("/")[0]
    done = real_cloud.operator("images", "import", "ubuntu_24_04", "--mirror", mirror)
    assert done.returncode == 0, done.stderr
    held = Library(real_cloud.config.images_dir).latest("ubuntu_24_04")
    assert held is not None and held.origin == (f"{mirror}/ubuntu-24.04-server-cloudimg-amd64.img", sha256)
    shown = {one["blueprintId"]: one for one in real_cloud.client().get_blueprints()["blueprints"]}["ubuntu_24_04"]
    assert (shown["name"], shown["version"], shown["type"]) == ("Ubuntu", "24.04", "os")
    (made,) = real_cloud.launch("noble", blueprint="ubuntu_24_04")
    try:
        assert made["username"] == "ubuntu"
        assert real_cloud.ssh("noble", "hostname; id -un", PATIENCE_SECONDS).split() == ["noble", "ubuntu"]
    finally:
        real_cloud.delete("noble")


def runs_of(cloud: RealCloud, name: str) -> str:
    """As :func:`runs`, for a guest that is still on its way through a cold boot."""
    cloud.ssh(name, "true", PATIENCE_SECONDS)
    return runs(cloud, name)
