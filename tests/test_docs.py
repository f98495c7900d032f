"""What stands in docs/ is true: its snippets run, and the files that it names exist."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs/differences.md")  # it names the official codes' files


def test_every_snippet_runs(capsys):
    """Those of one page one after the other, as a reader types them."""
    text = (ROOT / "docs/your_own.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) >= 8
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/your_own.md", "exec"), namespace)
    assert namespace["replay_ratio"] == 2.0 and namespace["loss"].isfinite()
    assert "of 20 steps at the goal" in capsys.readouterr().out


def test_the_snippet_of_drm_counts_dead_units():
    (snippet,) = re.findall(r"```python\n(from drm .*?\n)with torch", (ROOT / "docs/your_own.md").read_text(), re.S)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    namespace, ratios = dict(network=network, x=torch.randn(256, 8)), []
    for dead in (0, 32):
        for layer in (network[0], network[2]):
            layer.bias.data[:dead] = -20
        exec(snippet, namespace)
        ratios.append(float(namespace["beta"]))
    assert ratios[0] < 0.1 and abs(ratios[1] - 64 / 132) < 0.05


def test_the_snippet_of_the_readme_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    namespace = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    (mask,) = namespace["masks"]
    assert mask.shape == (64,) and mask.sum() < 64


LESSONS = sorted((ROOT / "docs/lessons").glob("*.md"))


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)
def test_a_lesson_quotes_the_scripts_as_they_stand(page):
    """Every function word for word, every test by its name."""
    text = page.read_text()
    scripts = [script.read_text() for script in ROOT.glob("*.py")]
    fences = re.findall(r"```python\n(.*?)```", text, re.S)
    assert fences and all(any(fence in script for script in scripts) for fence in fences)
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    names = re.findall(r"`(test_\w+)`", text)
    assert len(names) >= 4 and all(f"def {name}(" in tests for name in names)
    assert len(re.findall(r"^\d\. ", text, re.M)) == 3  # exercises


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_backticks_exist(page):
    """Files and functions() that a page names in backticks."""
    text = page.read_text()
    for name in re.findall(r"`((?:[\w-]+/)*[\w.-]+\.(?:py|sh|md|txt|toml))`", text):
        places = [ROOT / name, ROOT / "benchmark" / name, *ROOT.glob(f"*/{name}"), *ROOT.glob(f"*/*/{name}")]
        found = any(place.exists() for place in places)
        assert found or name in ("train.py", "mine.py"), f"{page.name} names {name}"
