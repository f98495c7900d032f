"""Every test runs in an empty folder, with torch and the signal handlers as they were."""

import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: more threads only wait for each other
os.environ.setdefault("MUJOCO_GL", "egl")
# The environments' processes find the scripts and tests/pixel_env.py, and import them once for all tests
TESTS = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests with & has it ignored
multiprocessing.set_forkserver_preload(["drqv2_plasticity", "adaptive_rr", "drm", "pixel_env"])

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def clean_slate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def quick_compiler(monkeypatch):
    """The compiler is PyTorch's own affair: without its last stage, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()


@pytest.fixture(scope="module")
def outcomes():
    """What a module's runs have learned, by flags."""
    return {}
