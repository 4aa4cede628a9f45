"""A Debian with its own kernel and systemd in a virtual machine, whose power a test can cut.

Owns: the image of the bare system, which is made once in a directory, the process of qemu, and root's commands over
ssh. Invariants: the guest reaches no network, and only this machine's loopback reaches it. A power cut (SIGKILL) loses
what the guest has not flushed to its disk: its page cache, and each cluster of the disk that was first written after
the last flush, since qemu holds the table of new clusters in its memory until then (qcow2 with `cache=writeback`).
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests import needs
from tests.harness.ports import free_port
from tests.harness.waiting import wait_until
from tests.torture.test_package import INSTALLED

PROJECT = Path(__file__).parents[2]
PACKAGES = (*INSTALLED, "linux-image-cloud-amd64", "openssh-server")
DISK_SIZE = "6G"
CLUSTERS = "cluster_size=4k"
TABLE_CACHE = "l2-cache-size=16M,cache-clean-interval=0"
"""The whole table of the disk: qemu writes none of it before the guest flushes."""
NETWORK = "[Match]\nType=ether\n[Network]\nAddress=10.0.2.15/24\n"
KERNEL = "root=/dev/vda rw console=ttyS0 systemd.getty_auto=no mitigations=off cryptomgr.notests"
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=60", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null")
UP_S_MAX = 1800.0
"""Of a boot. Without virtualization it takes a minute, on a machine with other work several."""
COMMAND_S_MAX = 1800.0


def has_virtualization() -> bool:
    """A kernel may have /dev/kvm without the processor's instructions for it, and then it runs no guest."""
    return bool(re.search(r"^flags.* (?:vmx|svm) ", Path("/proc/cpuinfo").read_text(), re.MULTILINE))


def made_image(place: Path) -> Path:
    """The directory of the bare system's disk, kernel and initrd, and the key that root accepts."""
    for program in ("mmdebstrap", "mkfs.ext4", "qemu-system-x86_64", "qemu-img", "ssh", "ssh-keygen"):
        needs.program(program)
    image = place / "image"
    if image.exists():
        return image
    with tempfile.TemporaryDirectory(dir=place) as name:
        work = Path(name)
        root, made = work / "root", work / "image"
        made.mkdir()
        subprocess.run([PROJECT / "tools/bare_debian.sh", "make", root, *PACKAGES], check=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", made / "key"], check=True)
        (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
        shutil.copy(made / "key.pub", root / "root/.ssh/authorized_keys")
        (root / "etc/systemd/network/ether.network").write_text(NETWORK)
        subprocess.run(["systemctl", "--quiet", f"--root={root}", "enable", "systemd-networkd"], check=True)
        for link in ("vmlinuz", "initrd.img"):
            shutil.copy(root / link, made / link)
        subprocess.run(["mkfs.ext4", "-q", "-d", root, made / "disk", DISK_SIZE], check=True)
        made.rename(image)
    return image


class VirtualMachine:
    """Of two processors and 1 GiB, on a disk of its own above the image's, in the directory `work`. `files`: a tar
    that the guest has as /dev/vdb."""

    def __init__(self, image: Path, work: Path, files: Path) -> None:
        self._image, self._work, self._files = image, work, files
        disk = ("-o", CLUSTERS, "-F", "raw", "-b", image / "disk", work / "disk.qcow2")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *disk], check=True)

    def boot(self) -> None:
        port = free_port()
        words = ["-accel", "kvm" if has_virtualization() else "tcg", "-cpu", "max", "-smp", "2", "-m", "1024"]
        words += ["-nodefaults", "-display", "none", "-serial", f"file:{self._work / 'console'}"]
        words += ["-drive", f"file={self._work / 'disk.qcow2'},if=virtio,cache=writeback,{TABLE_CACHE}"]
        words += ["-drive", f"file={self._files},if=virtio,format=raw,readonly=on"]
        words += ["-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"]
        words += ["-device", "virtio-net-pci,netdev=net", "-kernel", str(self._image / "vmlinuz")]
        words += ["-initrd", str(self._image / "initrd.img"), "-append", KERNEL]
        self._qemu = subprocess.Popen(["qemu-system-x86_64", *words], stdin=subprocess.DEVNULL)
        self._ssh = ["ssh", "-S", str(self._work / "ssh"), "-i", str(self._image / "key"), "-p", str(port)]
        self._ssh += [word for option in SSH_OPTIONS for word in ("-o", option)] + ["root@127.0.0.1"]
        self._wait_until_up("")

    def _wait_until_up(self, former: str) -> None:
        """`former`: the id of the boot before."""

        def is_up() -> bool:
            assert self._qemu.poll() is None, "qemu has ended"
            # The connection that all commands share. It ends with the guest.
            if subprocess.run([*self._ssh, "-O", "check"], capture_output=True, check=False).returncode:
                null = subprocess.DEVNULL
                subprocess.run([*self._ssh, "-MNf"], stdin=null, stdout=null, stderr=null, check=False)
            done = self.ask(f"systemctl is-system-running --wait >/dev/null || true; {BOOT_ID}")
            return done.returncode == 0 and done.stdout != former

        wait_until(is_up, seconds=UP_S_MAX)

    def command(self, text: str) -> list[str]:
        """The words of a process here that runs shell commands there, as root in root's home."""
        return [*self._ssh, shlex.join(["bash", "-ec", text])]

    def ask(self, text: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """`given`: its standard input."""
        return subprocess.run(
            self.command(text), input=given, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False
        )

    def sh(self, text: str, given: str = "") -> str:
        """The output of commands. They must end well."""
        done = self.ask(text, given)
        assert done.returncode == 0, f"{text}\nended with {done.returncode}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()

    def reboot(self) -> None:
        former = self.ask(BOOT_ID).stdout
        self.ask("systemctl reboot")
        self._wait_until_up(former)

    def cut_power(self) -> None:
        self._qemu.kill()
        self._qemu.wait()
