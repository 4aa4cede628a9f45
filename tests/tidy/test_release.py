"""What a release is made from."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.tidy.project_tree import none, python_files, tree_of
from tools.release import dist

PROJECT = Path(__file__).parents[2]
PINNED = re.compile(r"^([\w.-]+)==([\w.]+)", re.MULTILINE)

IN_A_CHECKOUT = re.compile(r"(?<!/)\b(docs|examples|deploy|tests|tools)/[\w-]+|README")


def pinned(place: str) -> dict[str, str]:
    text = (PROJECT / place).read_text("utf-8")
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in PINNED.findall(text)}


def test_a_release_has_the_versions_that_the_tests_run_with() -> None:
    released, tested = pinned("tools/release/requirements.txt"), pinned("tools/bootstrap/constraints.txt")
    assert len(released) > 20
    assert released.items() <= tested.items()


def test_a_release_has_the_libraries_of_every_program_and_token() -> None:
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    needed = {
        re.match(r"[\w-]+", library)[0]  # type: ignore[index]  # each begins with its name
        for extra in ("server", "gateway", "postgresql", "replicator", "pkcs11", "aws-kms")
        for library in extras[extra]
    }
    assert needed - {"progressdb-minikms"} <= pinned("tools/release/requirements.txt").keys()


@pytest.mark.parametrize("lock", ["release/requirements.txt", "release/build.txt", "site/requirements.txt"])
def test_every_library_of_a_release_is_pinned_with_its_hash(lock: str) -> None:
    text = (PROJECT / "tools" / lock).read_text("utf-8").replace("\\\n", " ")
    assert all("--hash=sha256:" in line for line in text.splitlines())
    assert "://" not in text


def test_every_page_names_the_files_of_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (PROJECT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    pages = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), *(PROJECT / "deploy").rglob("*.md")]
    named = [re.findall(r"progressdb(?:_minikms)?[-_]([0-9][0-9.]*[0-9])", page.read_text("utf-8")) for page in pages]
    assert version and {found for each in named for found in each} == {version[1]}


def test_no_message_names_a_file_that_an_installation_lacks() -> None:
    """Every text of `src` but those that only readers of the code see: a docstring, the text below a constant."""
    found = []
    for path in python_files("src"):
        nodes = list(ast.walk(tree_of(path)))
        hidden = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in hidden]
        found += [f"{path}:{node.lineno}: {node.value!r}" for node in texts if IN_A_CHECKOUT.search(str(node.value))]
    none(found)


def test_a_release_is_signed_by_a_key_that_the_signers_name(tmp_path: Path) -> None:
    key, signers = tmp_path / "key", tmp_path / "signers"
    with pytest.raises(SystemExit, match="there is no "):
        dist.check_signer(key, dist.SIGNERS)
    (tmp_path / "key.pub").write_text("ssh-ed25519 AAAAkey ada@host\n")
    dist.check_signer(key, _written(signers, "# none\nrelease ssh-ed25519 AAAAother\nrelease ssh-ed25519 AAAAkey\n"))
    for text in ("", "release ssh-ed25519 AAAAother\n", "# release ssh-ed25519 AAAAkey\n", "ada ssh-ed25519 AAAAkey\n"):
        with pytest.raises(SystemExit, match="does not name the key"):
            dist.check_signer(key, _written(signers, text))
    with pytest.raises(SystemExit, match="does not name the key"):
        dist.check_signer(key, dist.SIGNERS)


def test_a_missing_program_is_named_with_its_package_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dpkg-deb").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"git, ssh-keygen, help2man: .* apt-get install git openssh-client help2man$"):
        dist.need_programs(signs=True)
    bare = ["/bin/sh", str(PROJECT / "tools/bare_debian.sh"), "make", str(tmp_path / "root")]
    done = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "bare_debian.sh: mmdebstrap is not installed: apt-get install mmdebstrap\n"


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
