"""Make a virtual environment with the project in it: `python3 tools/bootstrap/make_venv.py DIRECTORY`.

Owns the way from a bare `python3` to an installed project. It assumes the standard library less `ensurepip`, which
Debian splits off: pip comes from the wheel beside this file, whose SHA-256 is checked before any of it runs. Where
packages come from is for pip's own configuration to say (`PIP_*`, pip.conf); no registry is named here. Never prompts.
The stamp `DIRECTORY/.installed` is written last, so an interrupted run is done again. It states what was installed: a
file with a new date and the old content needs no second installation, and no network.

Written in the syntax of Python 3.6, so that an old interpreter gets the sentence below instead of a SyntaxError.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time

PYTHON_MIN = (3, 11)
HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(os.path.dirname(HERE))
PIP_WHEEL = os.path.join(HERE, "pip-26.3-py3-none-any.whl")
CONSTRAINTS = os.path.join(HERE, "constraints.txt")
INSTALL_TRIES = 3
PAUSE_SECONDS = 5
PIP_WHEEL_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


def check_python() -> None:
    """Exit with the way out where this interpreter is too old or lacks `venv`."""
    if sys.version_info < PYTHON_MIN:
        newer = [name for name in ("python3.14", "python3.13", "python3.12", "python3.11") if shutil.which(name)]
        way_out = f"Try: make PYTHON={newer[0]}" if newer else "Install one and name it: make PYTHON=/path/to/python3"
        version = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"{sys.executable} is Python {version}; this project needs 3.11 or newer.\n{way_out}")
    try:
        import venv  # noqa: F401 (only to see that it is there)
    except ImportError:
        sys.exit(f"{sys.executable} has no `venv` module. On Debian: apt-get install python3")


def check_pip_wheel() -> None:
    """Exit unless the wheel is byte for byte the one that was released."""
    with open(PIP_WHEEL, "rb") as wheel:
        found = hashlib.sha256(wheel.read()).hexdigest()
    if found != PIP_WHEEL_SHA256:
        sys.exit(f"{PIP_WHEEL} was altered: SHA-256 {found}, expected {PIP_WHEEL_SHA256}")


def run(*command: str, tries: int = 1) -> None:
    """Run one step, up to `tries` times; if it fails, end the program after the step's own message."""
    for left in reversed(range(tries)):
        status = subprocess.call(command, cwd=PROJECT, stdin=subprocess.DEVNULL)  # noqa: S603 (no shell; paths are our own)
        if status == 0:
            return
        if left:
            print("that failed; trying again ...", flush=True)
            time.sleep(PAUSE_SECONDS)
    sys.exit(f"failed ({status}): {' '.join(command)}")


def described(directory: str) -> str:
    """What the stamp says of a finished environment: its place, and the interpreter."""
    return f"{directory}\n{sys.version_info[0]}.{sys.version_info[1]} {os.path.realpath(sys.executable)}\n"


def requirements_digest() -> str:
    """The last line of the stamp: SHA-256 of the files that say what to install."""
    digest = hashlib.sha256()
    for path in (os.path.join(PROJECT, "pyproject.toml"), CONSTRAINTS):
        with open(path, "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest() + "\n"


def read_stamp(stamp: str) -> str:
    """What the last finished run said, or nothing."""
    if not os.path.exists(stamp):
        return ""
    with open(stamp) as file:
        return file.read()


def make_empty(directory: str, python: str) -> None:
    """A virtual environment with nothing but pip. Refuses to clear a directory that is not a virtual environment."""
    if os.path.isdir(directory) and os.listdir(directory) and not os.path.exists(os.path.join(directory, "pyvenv.cfg")):
        sys.exit(f"{directory} exists and is no virtual environment; name another: make VENV=DIRECTORY")
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", directory)
    # A wheel is a zip, and Python runs packages out of zips: pip installs itself.
    run(python, os.path.join(PIP_WHEEL, "pip"), "install", "--quiet", "--no-index", "--no-deps", PIP_WHEEL)


def main() -> None:
    usage = "usage: python3 tools/bootstrap/make_venv.py DIRECTORY"
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(usage)
        return
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(usage)
    check_python()
    check_pip_wheel()
    directory = os.path.abspath(sys.argv[1])
    python = os.path.join(directory, "bin", "python")
    stamp = os.path.join(directory, ".installed")

    if os.path.exists(directory) and not os.access(directory, os.W_OK):
        sys.exit(f"{directory} belongs to another user; name another: make VENV=DIRECTORY")
    said, place, digest = read_stamp(stamp), described(directory), requirements_digest()
    if said == place + digest and os.path.exists(python):
        os.utime(stamp)
        return
    if said:
        os.unlink(stamp)  # from here on the environment counts as unfinished

    # What an interrupted run, another interpreter or a moved checkout left behind is not worth mending.
    if not said.startswith(place) or not os.path.exists(python):
        make_empty(directory, python)
    print(f"installing the project and its tools into {sys.argv[1]} ...", flush=True)
    pip_install = (python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check")
    # A registry that does not answer for a moment is asked again.
    run(*pip_install, "--constraint", CONSTRAINTS, "--editable", ".[server]", "--group", "dev", tries=INSTALL_TRIES)
    with open(stamp, "w") as file:
        file.write(place + digest)


if __name__ == "__main__":
    main()
