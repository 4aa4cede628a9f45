"""`make dist`: the files of a release, made from the commit that is checked out.

    python tools/release/dist.py DIRECTORY [--signing-key FILE]

Owns: which files a release has (wheel, sdist, SBOM, a package for Debian, SHA256SUMS and its signature), and how each
is made. Invariants: the same commit gives the same bytes, on any day, in any directory and for any user; no file of
another project is used whose SHA-256 is not in `requirements.txt` or `build.txt`, and each of those is installed
without running any of its code; the directory is complete, or is not there. Where `dpkg-deb` is missing there is no
package for Debian.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from email.utils import formatdate
from pathlib import Path
from typing import Final, TextIO

PROJECT: Final = Path(__file__).resolve().parents[2]
RELEASE: Final = Path("tools", "release")
PIP: Final = next(PROJECT.glob("tools/bootstrap/pip-*.whl")) / "pip"
DEBIAN: Final = Path("deploy", "debian")
DEBIAN_PYTHON: Final = "/usr/bin/python3"
REVISION: Final = "1"
MAINTAINER: Final = "The miniKMS team <minikms@progressdb.invalid>"
UNIT_FILES: Final = ("*.service", "*.socket", "*.timer", "*.d/*.conf")
UNITS: Final = Path("deploy", "systemd")
PREFIX: Final = "opt/progressdb"
PROGRAMS: Final = {
    "minikms": "the key service and its commands",
    "minikms-auditor": "trees, witnesses and SIEM for the audit log of minikms",
    "minikms-gateway": "the key service for other hosts",
    "minikms-replicator": "the key service of minikms on several hosts",
    "minikms-unlock": "root keys for the key service: tokens, clouds, a passphrase",
    "progressdb": "the message server and its commands",
}
COMPLETIONS: Final = {
    "bash": "usr/share/bash-completion/completions/{}",
    "zsh": "usr/share/zsh/vendor-completions/_{}",
    "fish": "usr/share/fish/vendor_completions.d/{}.fish",
}
SIGNATURE_NAMESPACE: Final = "file"  # of ssh-keygen(1)
SIGNERS: Final = PROJECT / RELEASE / "signers"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make dist", description="Make the files of a release.")
    parser.add_argument("directory", type=Path, help="a directory that is not there yet")
    parser.add_argument("--signing-key", type=Path, help="an SSH key that signs SHA256SUMS; FILE.pub is beside it")
    parser.add_argument(
        "--signers", type=Path, default=SIGNERS, help="the keys that may; default: those of the project"
    )
    given = parser.parse_args()
    need_programs(signs=given.signing_key is not None)
    if given.directory.exists():
        sys.exit(f"make dist: {given.directory} is there already; remove it, or name another: make dist DIST=DIRECTORY")
    if not (PROJECT / ".git").exists():
        sys.exit("make dist: a release is made from a commit: run it in a clone of the repository")
    if said("git", "status", "--porcelain"):
        print("make dist: what is not committed is not in the release", file=sys.stderr)
    if given.signing_key is None:
        say("the release is not signed: KEY=FILE names an SSH key that signs its checksums")
    else:
        check_signer(given.signing_key, given.signers)
    os.umask(0o022)
    given.directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dist.", dir=given.directory.parent) as work:
        made = Release(Path(work).resolve()).made()
        sign(made, given.signing_key)
        made.rename(given.directory)
    print("\n".join(f"{path.stat().st_size:>12,}  {path}" for path in sorted(given.directory.iterdir())))


def need_programs(*, signs: bool) -> None:
    """Ends the program unless those are there that it runs; without `dpkg-deb` it makes no package."""
    packages = {"git": "git"}
    if signs:
        packages["ssh-keygen"] = "openssh-client"
    if shutil.which("dpkg-deb") is not None:
        packages |= {"help2man": "help2man", DEBIAN_PYTHON: "python3"}
    missing = [program for program in packages if shutil.which(program) is None]
    if missing:
        names = " ".join(packages[program] for program in missing)
        sys.exit(f"make dist: {', '.join(missing)}: not installed. Install first: apt-get install {names}")


class Release:
    """Of the commit HEAD, made below `work`."""

    def __init__(self, work: Path) -> None:
        self.tree, self.out, self.root = work / "tree", work / "out", work / "root"
        self.tools = work / "tools"
        for directory in (self.tree, self.out):
            directory.mkdir()
        os.environ.update(
            SOURCE_DATE_EPOCH=said("git", "log", "-1", "--format=%ct"),
            PYTHONPYCACHEPREFIX=str(work / "bytecode"),
            PYTHONHASHSEED="0",
            LC_ALL="C.UTF-8",
            TZ="UTC",
        )
        archive = work / "tree.tar"
        run("git", "-c", "tar.umask=0022", "archive", "--output", archive, "HEAD")
        with tarfile.open(archive) as members:
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4 has it
                members.extraction_filter = tarfile.data_filter
            members.extractall(self.tree)  # noqa: S202  git made the archive
        self.version = said(sys.executable, "-c", VERSION, str(self.tree / "pyproject.toml"))
        self.for_debian = shutil.which("dpkg-deb") is not None

    def made(self) -> Path:
        """The directory of the files."""
        environment = self.root / PREFIX
        say("the libraries, each with the SHA-256 of its lock")
        # The package uses the Python of Debian.
        make_environment(DEBIAN_PYTHON if self.for_debian else sys.executable, environment)
        install(environment, self.tree / RELEASE / "requirements.txt")
        make_environment(sys.executable, self.tools)
        install(self.tools, self.tree / RELEASE / "build.txt")

        say("the SBOM")
        sbom = self.tree / "sbom.cdx.json"
        run(
            *(self.tools / "bin/cyclonedx-py", "environment", environment / "bin/python", "--output-reproducible"),
            *("--pyproject", self.tree / "pyproject.toml", "--spec-version", "1.6", "--output-file", sbom),
        )
        shutil.copy(sbom, self.out / f"progressdb-minikms-{self.version}.cdx.json")

        say("wheel and sdist")
        run(self.tools / "bin/hatchling", "build", "-d", self.out, at=self.tree)
        if self.for_debian:
            say("the package for Debian")
            self._package(environment, json.loads(sbom.read_text("utf-8")))
        else:
            say("no package for Debian: dpkg-deb is not there")
        return self.out

    def _package(self, environment: Path, sbom: dict[str, object]) -> None:
        wheels = ("--no-index", "--find-links", self.out, f"progressdb-minikms=={self.version}")
        pip_install(environment, "--no-deps", "--no-compile", *wheels)
        for program, about in PROGRAMS.items():
            self._describe(program, about, environment / "bin" / program)
            self._link(f"usr/bin/{program}", f"/{PREFIX}/bin/{program}")
        self._link(f"{PREFIX}/minikms", "bin/minikms")  # the path of older configurations
        relocate(environment, f"/{PREFIX}")

        units = self.tree / UNITS
        for unit in (path for kind in UNIT_FILES for path in units.glob(kind)):
            self._put(f"usr/lib/systemd/system/{unit.relative_to(units)}", unit.read_bytes())
        self._put("usr/lib/sysusers.d/progressdb.conf", (units / "progressdb.sysusers").read_bytes())
        self._put("usr/lib/tmpfiles.d/progressdb.conf", (self.tree / DEBIAN / "tmpfiles").read_bytes())
        self._put(f"{PREFIX}/bin/progressdb-backup", (units / "progressdb-backup").read_bytes(), mode=0o755)
        documents = "usr/share/doc/progressdb"
        shutil.copytree(self.tree / "docs", self.root / documents / "docs", ignore=shutil.ignore_patterns("decisions"))
        shutil.copytree(self.tree / "deploy", self.root / documents / "deploy", ignore=shutil.ignore_patterns("debian"))
        for page in ("README.md", "SECURITY.md"):
            self._put(f"{documents}/{page}", (self.tree / page).read_bytes())
        self._put(f"{documents}/changelog.gz", zipped((self.tree / "CHANGELOG.md").read_bytes()))
        self._put(f"{documents}/changelog.Debian.gz", zipped(self._debian_changelog()))
        self._put(f"{documents}/copyright", copyright_of(self.tree / DEBIAN / "copyright", sbom))
        self._put("usr/share/lintian/overrides/progressdb", (self.tree / DEBIAN / "lintian-overrides").read_bytes())

        control = self.root / "DEBIAN"
        for script in ("config", "postinst", "prerm", "postrm"):
            self._put(f"DEBIAN/{script}", (self.tree / DEBIAN / script).read_bytes(), mode=0o755)
        self._put("DEBIAN/templates", (self.tree / DEBIAN / "templates").read_bytes())
        self._put("DEBIAN/md5sums", md5sums(self.root))
        major, minor = said(str(environment / "bin/python"), "-c", PYTHON).split()
        architecture = said("dpkg", "--print-architecture")
        fields = {
            "VERSION": f"{self.version}-{REVISION}",
            "MAINTAINER": MAINTAINER,
            "ARCHITECTURE": architecture,
            "SIZE": str(sum(path.lstat().st_size for path in self.root.rglob("*")) // 1024),
            "PYTHON": f"python3 (>= {major}.{minor}~), python3 (<< {major}.{int(minor) + 1}~)",
        }
        text = (self.tree / DEBIAN / "control").read_text("utf-8")
        for name, value in fields.items():
            text = text.replace(f"@{name}@", value)
        (control / "control").write_text(text, "utf-8")
        run(
            *("dpkg-deb", "--root-owner-group", "-Zxz", "--build", self.root),
            self.out / f"progressdb_{self.version}-{REVISION}_{architecture}.deb",
        )

    def _debian_changelog(self) -> bytes:
        """deb-changelog(5), of this version alone."""
        at = formatdate(int(os.environ["SOURCE_DATE_EPOCH"]))
        entry = f"progressdb ({self.version}-{REVISION}) stable; urgency=medium\n\n  * See changelog.gz.\n\n"
        return f"{entry} -- {MAINTAINER}  {at}\n".encode()

    def _describe(self, program: str, about: str, path: Path) -> None:
        """Its manual page, and its completions for three shells."""
        page = said("help2man", "--no-info", f"--name={about}", f"--version-string={self.version}", str(path))
        self._put(f"usr/share/man/man1/{program}.1.gz", zipped(page.encode() + b"\n"))
        for shell, place in COMPLETIONS.items():
            self._put(place.format(program), said(str(path), "completion", shell).encode() + b"\n")

    def _put(self, place: str, content: bytes, *, mode: int = 0o644) -> None:
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    def _link(self, place: str, target: str) -> None:
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


PYTHON: Final = "import sys; print(*sys.version_info[:2])"
VERSION: Final = 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["project"]["version"])'


def make_environment(python: str, place: Path) -> None:
    run(python, "-m", "venv", "--without-pip", "--symlinks", place)


def install(environment: Path, lock: Path) -> None:
    """The wheels of a lock. `--only-binary`: an sdist would run code of its own to be installed."""
    pip_install(environment, "--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-compile", "-r", lock)


def pip_install(environment: Path, *flags: str | Path) -> None:
    run(sys.executable, PIP, "--python", environment / "bin/python", "install", "-q", "--no-input", *flags)


def relocate(environment: Path, place: str) -> None:
    """Let the scripts of an environment name the interpreter at `place`, where the package puts it."""
    for path in (environment / "bin").iterdir():
        if path.name in PROGRAMS:
            path.write_bytes(path.read_bytes().replace(os.fsencode(environment), os.fsencode(place)))
        elif not path.is_symlink():
            path.unlink()  # a program of a library, or `activate`, which names the place where it was made
    (environment / ".gitignore").unlink(missing_ok=True)
    shutil.rmtree(environment / "share" / "doc")  # the package has the pages in /usr/share/doc
    config = environment / "pyvenv.cfg"
    lines = config.read_text("utf-8").splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("command")), "utf-8")
    for record in environment.glob("lib/python3*/site-packages/*.dist-info/RECORD"):  # has digests of the scripts
        lines = record.read_text("utf-8").splitlines(keepends=True)
        record.write_text(
            "".join(line for line in lines if not line.startswith(("../../../bin/", "../../../share/doc/"))), "utf-8"
        )


def copyright_of(template: Path, sbom: dict[str, object]) -> bytes:
    """The package's copyright file: the template, and for each library the licence that it declares."""
    components = sbom["components"]
    if not isinstance(components, list):
        sys.exit("make dist: the SBOM has no components")
    text = template.read_text("utf-8")
    for library in sorted(components, key=lambda each: each["name"].lower()):
        named = [entry.get("expression") or entry["license"].get("id") or "" for entry in library.get("licenses", [])]
        licence = next(filter(None, named), "see its metadata")
        text += f"\n {library['name']} {library['version']}: {licence}"
    return text.encode() + b"\n"


def md5sums(root: Path) -> bytes:
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    named = [(path, path.relative_to(root)) for path in files if path.relative_to(root).parts[0] != "DEBIAN"]
    digests = (f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {name}\n" for path, name in named)
    return "".join(digests).encode()


def check_signer(key: Path, signers: Path) -> None:
    """Ends the program unless the key is one that people check releases with."""
    public = key if key.suffix == ".pub" else Path(f"{key}.pub")
    if not public.is_file():
        sys.exit(f"make dist: there is no {public}, the public half of the key that signs the checksums")
    named = public.read_text("ascii").split()[:2]
    lines = [line.split() for line in signers.read_text("ascii").splitlines()]
    if not any(line[:1] == ["release"] and line[-len(named) :] == named for line in lines):
        sys.exit(f"make dist: {signers} does not name the key of {public}, so nobody could check the signature")


def sign(directory: Path, key: Path | None) -> None:
    """SHA256SUMS over all files, and its signature."""
    files = sorted(directory.iterdir())
    sums = directory / "SHA256SUMS"
    sums.write_text("".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files))
    if key is not None:
        run("ssh-keygen", "-q", "-Y", "sign", "-n", SIGNATURE_NAMESPACE, "-f", key, sums)


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, 9, mtime=0)


def said(*command: str) -> str:
    return run(*command, stdout=subprocess.PIPE).strip()


def run(*command: str | Path, at: Path = PROJECT, stdout: int | TextIO = sys.stderr) -> str:
    done = subprocess.run(  # noqa: S603 (no shell; the programs are named here)
        command, cwd=at, stdin=subprocess.DEVNULL, stdout=stdout, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"make dist: this command failed: {' '.join(map(str, command))}")
    return done.stdout or ""


def say(text: str) -> None:
    print(f"make dist: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
