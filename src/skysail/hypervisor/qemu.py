"""QEMU's command line, as a pure function of what a guest shall be. Golden files in the tests hold it still.

Source: QEMU "Invocation"; docs/devel/migration (x-ignore-shared). The network card is never here: it is plugged in by
the guest's owner object after the start, so that a clone does not carry its template's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from skysail.contract.migration import Shape
from skysail.storage import ceph

MACHINE = "pc-q35-7.2"
# What a template has; a plan's further memory is plugged in after the restore.
TEMPLATE_MEMORY_MIB = 512
# The range that memory can be plugged into is part of the machine's shape: the same in template and clone.
MAX_MEMORY_MIB = 66 * 1024
NIC_PORT = "port-nic"
MEMORY_PORT = "port-memory"
# The controller that block-storage disks are plugged into.
DISKS = "disks"
# Counts the machine's shapes: a template saved with one cannot be restored into another.
SHAPE = 2
CLONE_CHANNEL = "org.skysail.clone.0"
_DEVICE = ("-device", "virtio-blk-pci,id=vda,drive=disk,serial=system,bus=pcie.0,addr=0x14,bootindex=1")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One QEMU process.

    ``disk`` lists the chain of qcow2 files, the guest's own first and its parents behind it. ``memory`` says where the
    base memory comes from: ``private`` (the kernel's), ``template`` (a shared file that is being written), or ``clone``
    (the same file, read-only on disk, written copy-on-write). ``incoming`` waits for a device state to be loaded. The guest
    tells its ``seed`` from other disks by ``seed_serial``. ``cpu`` is the accelerator's own model unless it is named. A disk
    in a Ceph cluster is reached with the key in ``key_file``.
    """

    id: str
    accelerator: Literal["kvm", "tcg"]
    vcpus: int
    memory_mib: int
    folder: str
    disk: tuple[str, ...]
    generation_id: str
    memory: Literal["private", "template", "clone"] = "private"
    memory_file: str = ""
    pluggable: bool = False
    incoming: bool = False
    seed: str = ""
    seed_serial: str = "seed"
    type: str = MACHINE
    cpu: str = ""

    key_file: str = ""

    def shape(self) -> Shape:
        """What a guest sees of it."""
        return Shape(number=SHAPE, type=self.type, accelerator=self.accelerator,
                     cpu=self.cpu or cpu_model(self.accelerator), vcpus=self.vcpus, memory_mib=self.memory_mib,
                     pluggable=self.pluggable, seed_serial=self.seed_serial if self.seed else "")

    @property
    def networked(self) -> bool:
        """Whether the process itself talks to a network: to the cluster that has its disk."""
        return ceph.Image.find(self.disk[0]) is not None


def cpu_model(accelerator: str) -> str:
    """A named model, never ``host``: a guest must be able to move to another machine. The emulated one is the first 64-bit
    Opteron, which has no CMPXCHG16B: QEMU 7.2 sets wrong flags for that, of which Linux dies, and guests come to those."""
    return "Opteron_G1" if accelerator == "tcg" else "Westmere"


def argv(machine: Machine) -> list[str]:
    """The arguments of ``qemu-system-x86_64``."""
    run = Path(machine.folder)
    accelerator = "tcg,thread=multi,tb-size=128" if machine.accelerator == "tcg" else "kvm"
    size = f"{machine.memory_mib}M"
    memory = {
        "private": f"memory-backend-ram,id=ram,size={size}",
        "template": f"memory-backend-file,id=ram,size={size},mem-path={machine.memory_file},share=on",
        # QEMU 10 opens the file read-only and still gives the guest writable, private memory (rom=off).
        "clone": f"memory-backend-file,id=ram,size={size},mem-path={machine.memory_file},share=off,readonly=on,rom=off",
    }[machine.memory]
    slots = f",slots=4,maxmem={MAX_MEMORY_MIB}M" if machine.pluggable else ""
    words = [
        "-name", f"guest={machine.id}", "-nodefaults", "-no-user-config", "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-machine", f"{machine.type},memory-backend=ram,usb=off,vmport=off", "-accel", accelerator,
        "-cpu", machine.cpu or cpu_model(machine.accelerator),
        "-smp", f"{machine.vcpus},sockets=1,cores={machine.vcpus},threads=1",
        "-m", size + slots, "-object", memory,
        "-rtc", "base=utc", "-S",
        # A guest that powers itself off stays as a paused process until somebody has seen it: even if no agent was
        # alive at that moment, the next one can tell "powered off" from "died".
        "-action", "shutdown=pause,panic=pause,reboot=reset",
        "-chardev", f"socket,id=qmp,path={run / 'qmp.sock'},server=on,wait=off", "-mon", "chardev=qmp,mode=control",
        "-chardev", f"file,id=serial,path={run / 'serial.log'},append=on", "-serial", "chardev:serial",
        "-device", f"pcie-root-port,id={NIC_PORT},bus=pcie.0,addr=0x10,chassis=1,slot=1",
        "-device", f"pcie-root-port,id={MEMORY_PORT},bus=pcie.0,addr=0x11,chassis=2,slot=2",
        "-device", f"vmgenid,id=vmgenid,guid={machine.generation_id}",
        "-object", "rng-random,id=entropy,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=entropy,bus=pcie.0,addr=0x12",
        "-device", "virtio-serial-pci,id=channels,bus=pcie.0,addr=0x13",
        "-device", f"virtio-scsi-pci,id={DISKS},bus=pcie.0,addr=0x16",
        "-chardev", f"socket,id=agent,path={run / 'agent.sock'},server=on,wait=off",
        "-device", "virtserialport,bus=channels.0,nr=1,chardev=agent,name=org.qemu.guest_agent.0",
        "-chardev", f"socket,id=clone,path={run / 'clone.sock'},server=on,wait=off",
        "-device", f"virtserialport,bus=channels.0,nr=2,chardev=clone,name={CLONE_CHANNEL}",
    ]
    if machine.key_file:
        words += ["-object", ceph.secret(machine.key_file)]
    words += _disk(machine.disk)
    if machine.seed:
        words += ["-blockdev", f"driver=file,node-name=seed-file,filename={machine.seed},read-only=on",
                  "-blockdev", "driver=raw,node-name=seed,file=seed-file,read-only=on",
                  "-device", f"virtio-blk-pci,drive=seed,serial={machine.seed_serial},bus=pcie.0,addr=0x15"]
    if machine.incoming:
        words += ["-incoming", "defer"]
    return words


def nodes(name: str, chain: Sequence[str]) -> list[dict[str, Any]]:
    """The same chain as :func:`argv` makes of a system disk, in the words of ``blockdev-add``: the deepest parent first, the
    disk's own node ``name`` last. An image in a cluster is one node."""
    image = ceph.Image.find(chain[0])
    if image is not None:
        return [image.node(name)]
    made: list[dict[str, Any]] = []
    for depth in reversed(range(len(chain))):
        mine = f"{name}-{depth}" if depth else name
        held: dict[str, Any] = {"read-only": True} if depth else {"discard": "unmap"}
        # Named even where there is none: what the file says of its parent is not followed.
        backing = f"{name}-{depth + 1}" if depth + 1 < len(chain) else None
        made.append({"driver": "file", "node-name": f"{mine}-file", "filename": chain[depth], **held})
        made.append({"driver": "qcow2", "node-name": mine, "file": f"{mine}-file", "backing": backing, **held})
    return made


def _disk(chain: tuple[str, ...]) -> list[str]:
    """The chain as block nodes, the deepest parent first; every format is named, none is probed."""
    words: list[str] = []
    if ceph.Image.find(chain[0]) is not None:
        (image,) = nodes("disk", chain)
        return ["-blockdev", json.dumps(image, separators=(",", ":")), *_DEVICE]
    for depth in reversed(range(len(chain))):
        only_read = ",read-only=on" if depth else ",read-only=off"
        name = "disk" if depth == 0 else f"parent{depth}"
        parent = f",backing=parent{depth + 1}" if depth + 1 < len(chain) else ""
        discard = "" if depth else ",discard=unmap"
        node = f"driver=qcow2,node-name={name},file={name}-file{only_read}{discard}{parent}"
        if len(chain) == 1:
            # It stands on nothing, whatever it says itself of a parent: that can only be said in JSON.
            node = json.dumps(nodes(name, chain)[-1], separators=(",", ":"))
        words += ["-blockdev", f"driver=file,node-name={name}-file,filename={chain[depth]}{only_read}{discard}",
                  "-blockdev", node]
    return [*words, *_DEVICE]
