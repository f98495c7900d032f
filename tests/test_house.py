"""Rules that hold for every script and every sweep of the repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
SWEEPS = sorted(path for path in (ROOT / "benchmark").glob("*_*.sh"))
IMPORT_NAMES = {"ale_py": "ale-py"}  # where they differ from the package's
README = (ROOT / "README.md").read_text() + (ROOT / "benchmark" / "README.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_only_what_requirements_list(script):
    requirements = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    for node in ast.walk(ast.parse(script.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module.split(".")[0]]
        for module in modules:
            optional = module == "wandb"  # imported only behind --track
            listed = IMPORT_NAMES.get(module, module) in requirements
            assert module in sys.stdlib_module_names or listed or optional, module


def test_same_name_means_same_source():
    """What two scripts share is copied verbatim, so that a fix in one cannot be forgotten in another."""
    seen = {}
    for script in SCRIPTS:
        text = script.read_text()
        for node in ast.parse(text).body:
            own = ("Args", "train", "resolve_args")
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in own:
                source = ast.get_source_segment(text, node)
                assert seen.setdefault(node.name, source) == source, f"{node.name} in {script.name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_flag_is_used_and_documented(script):
    """Used where the work is done, not only where arguments are checked."""
    text = script.read_text()
    body = ast.parse(text).body
    working = [node for node in body if getattr(node, "name", "") not in ("Args", "resolve_args", "parse_args")]
    attributes = [node for part in working for node in ast.walk(part) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "args"}
    (args,) = [node for node in body if getattr(node, "name", "") == "Args"]
    derived = {"depth", "width", "protocol", "preset", "reset_times"}  # they only set other flags
    for field in [node for node in args.body if isinstance(node, ast.AnnAssign)]:
        assert field.target.id in used | derived, f"--{field.target.id} does nothing"
        assert "  # " in text.splitlines()[field.lineno - 1], f"--{field.target.id} has no documentation"


@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_print_their_commands(path, scale, tmp_path):
    shutil.copytree(ROOT / "benchmark", tmp_path / "benchmark", ignore=shutil.ignore_patterns("results"))
    command = ["bash", f"benchmark/{path.name}", "--dry-run"]
    environment = os.environ | {"SCALE": scale}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    *runs, draw = done.stdout.splitlines()
    assert len(set(runs)) == len(runs) >= 1
    assert all(re.match(r"python \w+\.py --env-id [\w/-]+ --exp-name [\w.-]+ --seed \d+", line) for line in runs)
    assert draw.startswith("python benchmark/plot_") and draw.endswith(f"{path.stem}_{scale}")


def test_sweeps_refuse_what_they_do_not_know():
    for scale, flag in (("huge", "--dry-run"), ("smoke", "--dryrun")):
        environment = os.environ | {"SCALE": scale}
        done = subprocess.run(["bash", SWEEPS[0], flag], env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_stand_in_the_figure_table(path):
    assert path.name in README


def test_readmes_name_only_files_that_exist():
    for name in re.findall(r"(?:bash|python) ((?:benchmark|tests)/[\w/]+\.\w+|\w+\.py)", README):
        assert (ROOT / name).exists(), name


def install(tmp_path, **programs):
    """Runs install.sh, copied alone, with some programs on the PATH replaced by one-line shell scripts."""
    shutil.copy(ROOT / "install.sh", tmp_path)
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, body in programs.items():
        (stubs / name.replace("_", ".")).write_text(f"#!/bin/sh\n{body}\n")
        (stubs / name.replace("_", ".")).chmod(0o755)
    environment = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "install.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert not (tmp_path / ".venv").exists()
    return done


def test_install_names_the_python_it_needs(tmp_path):
    old = 'test "$1" = --version && echo Python 3.9.2 && exit 0; exit 1'
    done = install(tmp_path, python3=old, python3_11=old, python3_12=old)
    assert done.returncode == 1 and done.stderr == "install.sh: needs Python 3.11 or 3.12; found: Python 3.9.2\n"


def test_install_names_the_packages_it_may_not_install(tmp_path):
    done = install(tmp_path, ldconfig="exit 0", id="echo 1000", sudo="exit 1")
    packages = "libegl1 libgl1-mesa-dri libglx-mesa0 libopengl0"
    assert done.returncode == 1 and done.stderr == f"install.sh: please run: sudo apt-get install {packages}\n"
