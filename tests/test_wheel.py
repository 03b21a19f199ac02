"""LOP installed from its wheel, in a folder that holds the user's own modules of the same names."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lop
from lop.model.find import assets

pytestmark = pytest.mark.timeout(900)  # Starts of Ray and Serve, which on a busy machine take minutes.
_ROOT = Path(__file__).parents[1]
_OWN = (
    *("lop.py", "serve.py", "ray_jobs.py", "configs/__init__.py", "tests/__init__.py"),
    "colorsys.py",  # Of the standard library, and imported late.
    "transformers.py",
)
_FEW = (
    *("--set", "search.targets={first: 0.5, last: 0.5, step: 0.1}", "--set", "search.roots=[flap]"),
    *("--set", "search.evaluations=2", "--set", "search.simulations=3"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=_ROOT, check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The wheel's own folder; what it depends on is the environment's."""
    folder = wheel.parent / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    subprocess.run(pip, check=True)
    _write(folder / "configs" / "tiny.yaml", "model: another package's\n")
    return folder


@pytest.fixture
def crowded(tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where each of the user's modules raises when it is imported."""
    for name in _OWN:
        _write(tmp_path / name, "raise RuntimeError(f'{__file__} is not for LOP')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    return tmp_path


def test_the_wheel_holds_all_that_the_checkout_has(wheel: Path) -> None:
    rooms = {"lop": "lop", "ray_jobs": "ray_jobs", "serve": "serve", "configs": "lop/configs"}
    wanted = {
        f"{inside}/{path.relative_to(_ROOT / room).as_posix()}"
        for room, inside in rooms.items()
        for path in (_ROOT / room).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in held if ".dist-info/" not in name} == wanted


def test_a_search_on_ray_takes_lops_own_modules(crowded: Path, installed: Path) -> None:
    run = crowded / "runs" / "a"
    run.mkdir(parents=True)
    shutil.copy(assets() / "run" / "statistics.safetensors", run)
    command = [sys.executable, installed / "bin" / "lop", "search", "--run", "runs/a", "--workers", "2", *_FEW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (run / "search.json").is_file()


def test_the_service_takes_lops_own_modules(crowded: Path, installed: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, installed / "bin" / "lop", "serve", "--storage", "s", "--port", str(port)]
    environment = {**os.environ, "RAY_enable_worker_prestart": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as service:
        assert service.stdout
        try:
            assert service.stdout.readline() == f"http://127.0.0.1:{port}/\n", "the service did not start"
            client = lop.Client(f"http://127.0.0.1:{port}", timeout=240)
            made = client.get("tiny", ratio=0.3, out=crowded / "made")
        finally:
            service.send_signal(signal.SIGTERM)
    assert service.returncode == 0
    assert lop.inspect(made).damage == ""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
