"""Every test runs in an empty folder, with torch and the signal handlers as they were."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks: more threads only wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def clean_slate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
