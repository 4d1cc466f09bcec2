"""shell/environment.sh: .venv is made once, repaired where its making was interrupted, and filled once.

Invariants: after a kill at any moment the next start has a working .venv; packages in it are kept; requirements are
installed once for each content of their file; an active environment is used unchanged.
"""

import os
import signal
import subprocess
import time

import pytest
from helpers import ROOT

FAKE_INSTALL = 'install_requirements() { echo "pip install $1"; }'


def environment(**more) -> dict:
    outside = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return outside | more


def bash(folder, commands, **more):
    source = f"set -euo pipefail\nsource {ROOT}/shell/environment.sh\n{FAKE_INSTALL}\n{commands}"
    return subprocess.run(
        ["bash", "-c", source], cwd=folder, env=environment(**more), capture_output=True, text=True
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a whole .venv."""
    folder = tmp_path_factory.mktemp("made")
    done = bash(folder, "make_venv")
    assert done.returncode == 0 and done.stdout.startswith("making .venv with Python"), done.stderr
    return folder


def works(folder) -> bool:
    return not subprocess.run([folder / ".venv/bin/python", "-m", "pip", "--version"], capture_output=True).returncode


def test_a_whole_venv_is_left_as_it_is(made):
    assert works(made)
    before = sorted(p.stat().st_mtime_ns for p in (made / ".venv" / "bin").iterdir())
    assert bash(made, "make_venv").stdout == ""
    assert before == sorted(p.stat().st_mtime_ns for p in (made / ".venv" / "bin").iterdir())


@pytest.mark.parametrize("damage", ["no pip", "half a pip", "no python", "unfinished"])
def test_a_damaged_venv_is_repaired_and_its_packages_are_kept(made, damage):
    [packages] = (made / ".venv").glob("lib/python*/site-packages")
    (packages / "mine.py").write_text("x = 1")
    {
        "no pip": lambda: [subprocess.run(["rm", "-rf", *packages.glob("pip*")])],
        "half a pip": lambda: subprocess.run(["rm", "-rf", packages / "pip" / "_internal"]),
        "no python": lambda: [path.unlink() for path in (made / ".venv" / "bin").glob("python*")],
        "unfinished": lambda: (made / ".venv" / ".unfinished").touch(),
    }[damage]()
    done = bash(made, "make_venv")
    assert done.returncode == 0 and works(made), done.stderr
    assert (packages / "mine.py").read_text() == "x = 1" and not (made / ".venv" / ".unfinished").exists()


def test_killed_while_it_is_made(tmp_path):
    process = subprocess.Popen(
        ["bash", "-c", f"source {ROOT}/shell/environment.sh; make_venv"],
        cwd=tmp_path, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(tmp_path.glob(".venv/lib/python*/site-packages/pip/_vendor/*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert bash(tmp_path, "make_venv").returncode == 0 and works(tmp_path)


def test_requirements_are_installed_once_for_each_content(made):
    (made / "a.txt").write_text("one\n")
    (made / "b.txt").write_text("two\n")
    prepare = "prepare_environment a.txt b.txt; which python"

    def installed():
        done = bash(made, prepare)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"{made}/.venv/bin/python", done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("pip install")]

    assert installed() == ["pip install a.txt", "pip install b.txt"]
    assert installed() == []
    (made / "b.txt").write_text("three\n")
    assert installed() == ["pip install b.txt"]


def test_a_failed_install_is_tried_again(made):
    (made / "a.txt").write_text("fails\n")
    failing = "install_requirements() { return 1; }\nprepare_environment a.txt"
    assert bash(made, failing).returncode == 1
    assert "pip install a.txt" in bash(made, "prepare_environment a.txt").stdout


def test_an_active_environment_is_used(made, tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    path = f"{made}/.venv/bin:{os.environ['PATH']}"
    done = bash(tmp_path, "prepare_environment a.txt; which python", VIRTUAL_ENV=str(made / ".venv"), PATH=path)
    assert done.stdout.splitlines()[-1] == f"{made}/.venv/bin/python" and not (tmp_path / ".venv").exists()
