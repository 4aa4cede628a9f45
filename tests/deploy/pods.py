"""Pods without a cluster: processes in namespaces, with the users, modes and mounts that the manifests name.

Owns: what a kubelet makes of a pod's volumes and security context, and what a runtime makes of a container's. Each
container has its own mount, pid, IPC and UTS namespace (bubblewrap), a read-only root, and no capability; the network
is that of this machine. Volumes are as the kubelet makes them: `emptyDir` and claims belong to the group of the pod
(2777, 2775); the files of secrets and projected volumes lie behind the link `..data`, are root's and readable by the
group; a volume of a config map can be written by everybody, those in memory are sticky. Invariants: a field of the
manifests that is not known here raises, so that none is silently untested. It must never change what the manifests say,
except ports and names of hosts.
"""

import base64
import contextlib
import ctypes
import errno
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from tests import needs
from tests.harness.waiting import wait_until

PROJECT = Path(__file__).parents[2]
KUBERNETES = PROJECT / "deploy" / "kubernetes"
COMPOSE = PROJECT / "deploy" / "compose" / "compose.yaml"
SECCOMP = PROJECT / "deploy" / "containers" / "minikms-seccomp.json"
MEMLOCK_BYTES = 8 * 1024 * 1024
"""What runtimes give containers on current kernels: the kernel's default."""
STOP_S_MAX = 60.0
ALLOW, ERRNO = 0x7FFF0000, 0x50000  # SCMP_ACT_ALLOW and SCMP_ACT_ERRNO of seccomp.h
Document = dict[str, Any]
Objects = Mapping[str, Mapping[str, bytes]]
"""Secrets, config maps and tokens: their files by `kind/name`."""

LAUNCHER = """
import base64, ctypes, json, os, resource, sys
how = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def prctl(*arguments):
    if libc.prctl(*(ctypes.c_ulong(a) for a in arguments)) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")
resource.setrlimit(resource.RLIMIT_MEMLOCK, (how["memlock"], how["memlock"]))
os.umask(0o022)
for capability in range(41):
    prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
os.setgroups(how["groups"])
os.setresgid(how["gid"], how["gid"], how["gid"])
os.setresuid(how["uid"], how["uid"], how["uid"])
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
if libc.capset(header, none) != 0:  # the inheritable set too, as runtimes do
    raise OSError(ctypes.get_errno(), "capset")
prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
if how["filter"]:
    program = base64.b64decode(how["filter"])
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))
    loaded = Program(len(program) // 8, program)
    prctl(22, 2, ctypes.addressof(loaded), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
os.execvpe(how["command"][0], how["command"], how["environ"])
"""
"""Becomes the container's user without rights, and then its program. Runs under the container's own interpreter."""


def build(overlay: str, *components: str) -> list[Document]:
    """The objects of an overlay, with the components that its file has as comments."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(KUBERNETES, copy, dirs_exist_ok=True)
        file = Path(copy) / "overlays" / overlay / "kustomization.yaml"
        text = file.read_text()
        for component in components:
            assert f"  # - ../../components/{component}\n" in text
            text = text.replace(f"# - ../../components/{component}\n", f"- ../../components/{component}\n")
        file.write_text(text)
        return _built(file.parent)


def _built(directory: Path) -> list[Document]:
    done = subprocess.run(
        [needs.program("kustomize"), "build", str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def pod_of(documents: Sequence[Document]) -> Document:
    """The pod of the only StatefulSet."""
    [found] = [document for document in documents if document["kind"] == "StatefulSet"]
    spec: Document = found["spec"]["template"]["spec"]
    return spec


@functools.cache
def compiled(profile: Path) -> bytes:
    """The program of a seccomp profile, as a runtime makes it with libseccomp."""
    rules = json.loads(profile.read_text())
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    assert rules["defaultAction"] == "SCMP_ACT_ERRNO"
    context = ctypes.c_void_p(seccomp.seccomp_init(ERRNO | rules["defaultErrnoRet"]))
    for rule in rules["syscalls"]:
        action = {"SCMP_ACT_ALLOW": ALLOW, "SCMP_ACT_ERRNO": ERRNO | rule.get("errnoRet", errno.EPERM)}[rule["action"]]
        for name in rule["names"]:
            number = seccomp.seccomp_syscall_resolve_name(name.encode())
            if number != -1:  # a runtime leaves out what it does not know, too
                assert seccomp.seccomp_rule_add_array(context, action, number, 0, None) == 0, name
    with tempfile.TemporaryFile() as file:
        assert seccomp.seccomp_export_bpf(context, file.fileno()) == 0
        file.seek(0)
        return file.read()


def composed() -> Document:
    """deploy/compose/compose.yaml as docker-compose reads it, with every profile."""
    command = [needs.program("docker-compose"), "--file", str(COMPOSE), "--profile", "*", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    parsed: Document = json.loads(done.stdout)
    return parsed


class Volumes:
    """The volumes of a pod, in `base`. They outlive its containers."""

    def __init__(self, base: Path, pod: Document, objects: Objects) -> None:
        self._base = base
        self._group = pod["securityContext"]["fsGroup"]
        self._objects = objects
        self._versions = 0
        self._specs = {volume["name"]: volume for volume in pod["volumes"]}
        for name in self._specs:
            self._make(name)

    def path(self, name: str) -> Path:
        return self._base / name

    def _make(self, name: str) -> None:
        spec = {key: value for key, value in self._specs[name].items() if key != "name"}
        [kind] = spec
        path = self.path(name)
        path.mkdir()
        modes = {
            "emptyDir": 0o2777,
            "persistentVolumeClaim": 0o2775,
            "secret": 0o3777,
            "projected": 0o3777,
            "configMap": 0o2777,
        }
        os.chown(path, 0, self._group)
        path.chmod(modes[kind])
        if kind in ("secret", "projected", "configMap"):
            self.refresh(name)

    def refresh(self, name: str) -> None:
        """The files of a volume, from the objects: a new directory, and the link to it replaced."""
        spec = self._specs[name]
        files = _files(spec, self._objects)
        self._versions += 1
        path = self.path(name)
        version = path / f"..2026_01_01_00_00_{self._versions:02}.1"
        version.mkdir()
        os.chown(version, 0, self._group)
        version.chmod(0o2755)
        for file, (content, mode) in files.items():
            (version / file).write_bytes(content)
            os.chown(version / file, 0, self._group)
            (version / file).chmod(mode | 0o440)  # what a group of the pod adds to a volume for reading
            if not (path / file).is_symlink():
                (path / file).symlink_to(f"..data/{file}")
        before = (path / "..data").resolve() if (path / "..data").is_symlink() else None
        (path / "..data_tmp").symlink_to(version.name)
        (path / "..data_tmp").rename(path / "..data")
        if before is not None:
            shutil.rmtree(before)


def _files(spec: Document, objects: Objects) -> dict[str, tuple[bytes, int]]:
    """Content and mode of each file of a secret or a projected volume."""
    if "secret" in spec:
        mode = spec["secret"]["defaultMode"]
        return {name: (content, mode) for name, content in objects[f"secret/{spec['secret']['secretName']}"].items()}
    found: dict[str, tuple[bytes, int]] = {}
    mode = spec["projected"]["defaultMode"]
    for source in spec["projected"]["sources"]:
        [(kind, what)] = source.items()
        if kind == "serviceAccountToken":
            found[what["path"]] = objects["token"][what["audience"]], 0o600
            continue
        content = objects[f"{kind}/{what['name']}"]
        items = what.get("items") or [{"key": name, "path": name} for name in content]
        found |= {item["path"]: (content[item["key"]], mode) for item in items}
    return found


class ComposeVolumes:
    """The volumes, secrets and directories of compose.yaml, in `base`, by their sources there. An empty volume takes
    owner, mode and content of its place in the image; files and directories of the host stay as they are.
    """

    def __init__(self, base: Path, services: Document, rootfs: Path, hosts: Mapping[str, Path]) -> None:
        self._paths = dict(hosts)
        for service in services.values():
            for volume in service["volumes"]:
                if volume["type"] == "volume" and volume["source"] not in self._paths:
                    path = self._paths[volume["source"]] = base / volume["source"]
                    subprocess.run(["cp", "--archive", rootfs / volume["target"].lstrip("/"), path], check=True)
        self._paths["scratch"] = base / "scratch"
        self._paths["scratch"].mkdir()
        self._paths["scratch"].chmod(0o1777)

    def path(self, name: str) -> Path:
        return self._paths[name]


def as_pod(services: Document) -> Document:
    """The services of compose.yaml as a pod: the same users, flags, variables and mounts."""
    groups = {group for service in services.values() for group in service["group_add"]}
    [group] = groups
    containers = []
    for name, service in services.items():
        uid, gid = service["user"].split(":")
        context: Document = {
            "runAsUser": int(uid),
            "runAsGroup": int(gid),
            "allowPrivilegeEscalation": "no-new-privileges:true" not in service["security_opt"],
            "readOnlyRootFilesystem": service["read_only"],
            "capabilities": {"drop": service["cap_drop"]},
        }
        if any(option.startswith("seccomp=") for option in service["security_opt"]):
            context["seccompProfile"] = {"type": "Localhost"}
        mounts: list[Document] = [
            {"name": volume["source"], "mountPath": volume["target"], "readOnly": volume.get("read_only", False)}
            for volume in service["volumes"]
        ]
        mounts += [
            {"name": secret["source"], "mountPath": f"/run/secrets/{secret['source']}", "readOnly": True}
            for secret in service.get("secrets", ())
        ]
        mounts += [{"name": "scratch", "mountPath": entry.partition(":")[0]} for entry in service.get("tmpfs", ())]
        container = {
            "name": name,
            "securityContext": context,
            "volumeMounts": mounts,
            "command": service["command"],
            "env": [{"name": key, "value": value} for key, value in service.get("environment", {}).items()],
        }
        if "healthcheck" in service:
            container["startupProbe"] = {"exec": {"command": service["healthcheck"]["test"][1:]}}
        containers.append(container)
    return {
        "securityContext": {
            "runAsNonRoot": True,
            "fsGroup": int(group),
            "fsGroupChangePolicy": "",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "automountServiceAccountToken": False,
        "containers": containers,
        "volumes": [],
    }


class Pod:
    """The containers of a pod. `rootfs`: the files of the image; None: this machine's, read-only."""

    def __init__(
        self,
        base: Path,
        pod: Document,
        objects: Objects,
        *,
        rootfs: Path | None = None,
        environ: Mapping[str, str] | None = None,
        hosts: Sequence[str] = (),
        volumes: ComposeVolumes | None = None,
    ) -> None:
        """`environ` replaces variables of the manifests: ports. `hosts`: names of this machine. `volumes` are there
        already.
        """
        needs.root()
        needs.namespaces("mount", "pid", "ipc", "uts")
        self._bwrap = needs.program("bwrap")
        self.base = base
        self._rootfs = rootfs
        self._replaced = dict(environ or {})
        self._context = dict(pod["securityContext"])
        (base / "volumes").mkdir(mode=0o711)
        base.chmod(0o755)
        (base / "hosts").write_text(f"127.0.0.1 localhost {' '.join(hosts)}\n")
        self.volumes: Volumes | ComposeVolumes = volumes or Volumes(base / "volumes", pod, objects)
        self.specs: dict[str, Document] = {}
        self.order: list[str] = []
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            self.specs[container["name"]] = container
            self.order.append(container["name"])
        self._ending = {c["name"] for c in pod.get("initContainers", ()) if c.get("restartPolicy") != "Always"}
        self._running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        _check_pod(pod)

    # --- containers ---------------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Starts a container, and waits for its startup probe, as the kubelet does before it starts the next one."""
        spec = self.specs[name]
        reader, writer = os.pipe()
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [*self._sandbox(spec), "--info-fd", str(writer), *self._interpreter(), "-c", LAUNCHER, self._how(spec)],
                pass_fds=[writer],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.defpath},
            )
        os.close(writer)
        with os.fdopen(reader, "rb") as info:
            assert select.select([info], [], [], STOP_S_MAX)[0], "bubblewrap says nothing"
            said = info.read()
        assert said, self.log(name).read_text()
        if name in self._ending:  # the kubelet waits for its end
            assert process.wait(STOP_S_MAX) == 0, self.log(name).read_text()
            return
        self._running[name] = process, json.loads(said)["child-pid"]
        if "startupProbe" in spec:
            wait_until(lambda: self._started(name))

    def _started(self, name: str) -> bool:
        assert self._running[name][0].poll() is None, self.log(name).read_text()
        return self.probe(name, "startupProbe")

    def log(self, name: str) -> Path:
        return self.base / f"{name}.log"

    def pid(self, name: str) -> int:
        """Of the container's first process, in this machine's namespace."""
        return self._running[name][1]

    def stop(self, name: str) -> int:
        """SIGTERM, as the kubelet sends it; the exit status."""
        process, pid = self._running.pop(name)
        os.kill(pid, signal.SIGTERM)
        return process.wait(STOP_S_MAX)

    def kill(self, name: str) -> None:
        process, pid = self._running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        process.wait(STOP_S_MAX)

    def run(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """A command in the container, as `kubectl exec` runs it."""
        inside = ["nsenter", "--target", str(self.pid(name)), "--mount", "--pid", "--ipc", "--uts", "--root", "--wd"]
        return subprocess.run(
            [*inside, *self._interpreter(), "-c", LAUNCHER, self._how(self.specs[name], *command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STOP_S_MAX,
            env={"PATH": os.environ.get("PATH", os.defpath)},
            check=False,
        )

    def probe(self, name: str, kind: str) -> bool:
        """Whether a probe of the manifests says yes."""
        probe = self.specs[name][kind]
        if "exec" in probe:
            return self.run(name, *probe["exec"]["command"]).returncode == 0
        get = probe["httpGet"]
        [port] = [p["containerPort"] for p in self.specs[name]["ports"] if p["name"] == get["port"]]
        scheme = get.get("scheme", "HTTP").lower()
        url = f"{scheme}://127.0.0.1:{self.port(port)}{get['path']}"
        command = [
            needs.program("curl"),
            "--silent",
            "--fail",
            "--insecure",
            "--max-time",
            "5",
            "--output",
            "/dev/null",
        ]
        return subprocess.run([*command, url], timeout=STOP_S_MAX, check=False).returncode == 0

    def refresh(self, volume: str) -> None:
        """Takes up changed objects, as the kubelet does."""
        assert isinstance(self.volumes, Volumes)
        self.volumes.refresh(volume)

    def fails(self, name: str, kind: str) -> bool:
        return not self.probe(name, kind)

    def port(self, port: int) -> int:
        """Where a port of the manifests is on this machine."""
        return int(self._replaced.get(f"PORT_{port}", port))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in [name for name in reversed(self.order) if name in self._running]:
            self.kill(name)

    # --- what a runtime does ------------------------------------------------------------------------------------------

    def _sandbox(self, spec: Document) -> list[str]:
        words = [self._bwrap, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1", "--die-with-parent"]
        words += [word for name in ("SETUID", "SETGID", "SETPCAP") for word in ("--cap-add", f"CAP_{name}")]
        mounts = [(mount["mountPath"], mount) for mount in spec["volumeMounts"]]
        if self._rootfs is None:
            words += [*_system_files(), *_directories(["/etc/hosts", *(place for place, _ in mounts)])]
        else:
            words += ["--ro-bind", str(self._rootfs), "/"]
            places = {"/etc/hosts": self.base / "hosts", "/proc": Path("/proc"), "/dev": Path("/dev")}
            places |= {place: self.volumes.path(mount["name"]) for place, mount in mounts}
            for place, source in places.items():
                _mount_point(self._rootfs / place.lstrip("/"), source)
        words += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", str(self.base / "hosts"), "/etc/hosts"]
        for place, mount in mounts:
            if set(mount) - {"name", "mountPath", "readOnly"}:
                raise AssertionError(f"fields that this test does not know: {mount}")
            bind = "--ro-bind" if mount.get("readOnly") else "--bind"
            words += [bind, str(self.volumes.path(mount["name"])), place]
        if self._rootfs is None:
            words += _own_files()  # last: the project may lie below the place of a volume, such as /tmp
        return [*words, "--remount-ro", "/", "--chdir", "/"]

    def _interpreter(self) -> list[str]:
        return [sys.executable if self._rootfs is None else "/usr/bin/python3", "-I"]

    def _how(self, spec: Document, *command: str) -> str:
        """What the launcher does, as JSON."""
        context = dict(spec["securityContext"])
        profile = context.pop("seccompProfile", None)
        restricted = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        uid, gid = context.pop("runAsUser"), context.pop("runAsGroup")
        assert context == restricted, "each container gives up all rights, and no field is unknown here"
        filtered = profile is not None and profile["type"] == "Localhost"
        environ = {"PATH": self._path(), "PYTHONDONTWRITEBYTECODE": "1"}
        environ |= {variable["name"]: variable["value"] for variable in spec.get("env", ())}
        environ |= {name: value for name, value in self._replaced.items() if name in environ}
        return json.dumps(
            {
                "uid": uid,
                "gid": gid,
                "groups": [self._context["fsGroup"]],
                "memlock": MEMLOCK_BYTES,
                "filter": base64.b64encode(compiled(SECCOMP)).decode() if filtered else "",
                "command": list(command) or [*spec["command"], *spec.get("args", ())],
                "environ": environ,
            }
        )

    def _path(self) -> str:
        own = os.path.dirname(sys.executable) if self._rootfs is None else "/opt/progressdb/bin"
        return f"{own}:/usr/local/bin:/usr/bin:/bin"


def _check_pod(pod: Document) -> None:
    """The fields of the pod that have a meaning here have the value that this module gives them."""
    context = pod["securityContext"]
    assert set(context) == {"runAsNonRoot", "fsGroup", "fsGroupChangePolicy", "seccompProfile"}
    assert context["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace", "hostUsers"} & set(pod)


def _system_files() -> list[str]:
    """This machine's programs and libraries, read-only."""
    words = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib64"):
        words += ["--symlink", f"usr/{name}", f"/{name}"]
    return words + _read_only("/etc/ld.so.cache")


def _own_files() -> list[str]:
    """The interpreter and the project, read-only."""
    places = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1]), str(PROJECT)}
    return _read_only(*sorted(place for place in places if not place.startswith("/usr")))


def _read_only(*places: str) -> list[str]:
    return [*_directories(places), *(word for place in places for word in ("--ro-bind-try", place, place))]


def _directories(places: Sequence[str]) -> list[str]:
    """The directories above these places, open to every user; bubblewrap would make them for root only."""
    above = {str(parent) for place in places for parent in Path(place).parents}
    return [word for place in sorted(above - {"/"}) for word in ("--perms", "0755", "--dir", place)]


def _mount_point(path: Path, source: Path) -> None:
    """As a runtime makes it in the image's files."""
    (path if source.is_dir() else path.parent).mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        path.touch()
