"""What every plotting script needs: runs read from their TensorBoard events, means with confidence bands, files."""

import argparse
import csv
import importlib.util
import itertools
import json
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
                     "figure.dpi": 120, "savefig.bbox": "tight", "font.size": 9})  # fmt: skip


def load_module(path: str):
    """A module under benchmark/ by its path there, as drm/plot.py; every folder has modules of the same names."""
    name = path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


# The same in every picture
INTERVALS = "95% bootstrap intervals over seeds (of two or three seeds: their range)"
BASELINES = ("plain", "drqv2", "dqn", "sac", "drq", "relu", "rr0.25", "static0.5")
METHODS = ("augmentation", "drm", "redo", "redo-rr1", "new", "adaptive")


def colours(arms) -> dict:
    """A colour for every arm: the baseline blue, the paper's method orange, the other ones the rest. Where nothing is
    without augmentation, augmentation alone is the baseline; beside Adaptive RR, ReDo is one of the rest."""
    rest = (f"C{i}" for i in itertools.count(2))
    baselines = BASELINES if "plain" in arms else (*BASELINES, "augmentation")
    methods = ("adaptive",) if "adaptive" in arms else METHODS
    return {arm: "C0" if arm in baselines else "C1" if arm in methods else next(rest) for arm in arms}


def arm(run) -> str:
    """The end of an --exp-name: redo_fig1-paper-weight-decay -> weight-decay."""
    return run.args["exp_name"].split("-", 2)[-1]


@dataclass
class Run:
    folder: Path
    args: dict
    action_repeat: int
    events: EventAccumulator

    def series(self, tag: str) -> tuple:
        """Steps (points,) in frames = agent steps x action repeat, and values (points,); empty where never logged."""
        if tag not in self.events.Tags()["scalars"]:
            return np.zeros(0), np.zeros(0)
        points = {event.step: event.value for event in self.events.Scalars(tag)}  # a resumed run may repeat steps
        steps = np.array(sorted(points))
        return steps * self.action_repeat, np.array([points[step] for step in steps])


def load_runs(*patterns: str, folder: str = "runs") -> list:
    """All runs whose --exp-name matches one of the shell patterns, sorted by environment, name and seed.

    SystemExit where there is none. A run that is not finished counts too, as far as it got. Of several folders with one
    environment, name and seed the newest finished one counts, as sweeps have it, or else the newest.
    """
    found = {}
    for path in sorted(Path(folder).glob("*/args.json")):
        description = json.loads(path.read_text())
        if any(fnmatch(description["args"]["exp_name"], pattern) for pattern in patterns):
            key = tuple(description["args"].get(name, "") for name in ("env_id", "exp_name", "seed"))  # studies: no env
            finished = (path.parent / "summary.json").exists()
            if finished or not found.get(key, (False,))[0]:
                found[key] = finished, path.parent, description
    if not found:
        raise SystemExit(f"error: no run under {folder}/ has an --exp-name that matches {' or '.join(patterns)}")
    unfinished = sum(not finished for finished, *_ in found.values())
    if unfinished:
        print(f"{unfinished} of {len(found)} runs are not finished: what averages runs ends where the shortest does")
    runs = []
    for _, (_, path, description) in sorted(found.items(), key=lambda item: item[0]):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        runs.append(Run(path, description["args"], description["action_repeat"], events))
    return runs


def task_name(env_id: str) -> str:
    """dm_control/walker-walk-v0 or shadowless:walker-walk-v0 -> walker-walk"""
    return re.split("[/:]", env_id)[-1].removesuffix("-v0")


def logged(runs: list, tag: str) -> list:
    """The runs that have logged a tag. SystemExit where there is none."""
    runs = [run for run in runs if len(run.series(tag)[0])]
    if not runs:
        raise SystemExit(f"error: none of these runs has logged {tag} yet")
    return runs


def comparable(runs: list, tag: str) -> list:
    """The runs that have logged a tag, on the tasks where every arm has one that did. SystemExit without any."""
    runs = logged(runs, tag)
    tasks = [{run.args["env_id"] for run in members} for members in group(runs, arm).values()]
    shared = set.intersection(*tasks)
    if not shared:
        raise SystemExit(f"error: no task has runs of all arms that have logged {tag}")
    return [run for run in runs if run.args["env_id"] in shared]


def run_to_film(*scripts: str) -> Path:
    """The command line's one argument, the folder of a run of one of these scripts; else one line, and exit code 2."""
    try:
        (folder,) = map(Path, sys.argv[1:])
        script = json.loads((folder / "args.json").read_text())["script"]
        (folder / "checkpoint.pt").stat()
    except (ValueError, OSError):
        print(f"usage: python {sys.argv[0]} RUN_DIR (with args.json and checkpoint.pt)", file=sys.stderr)
        raise SystemExit(2) from None
    if script not in scripts:
        line = f"a run of {script}.py; this films {', '.join(scripts)}. While it trains: --capture-video"
        print(f"error: {folder}: {line}", file=sys.stderr)
        raise SystemExit(2)
    return folder


def asked(description: str) -> tuple:
    """The command line of a script that draws one figure -> the runs, and the path of the picture without ending."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="a shell pattern of --exp-name")
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    arguments = parser.parse_args()
    return load_runs(arguments.runs, folder=arguments.folder), arguments.out


def group(runs: list, key) -> dict:
    """key(run) -> the runs with that key, in order of the keys."""
    groups = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return dict(sorted(groups.items()))


def mean_and_band(values: np.ndarray) -> tuple:
    """values (seeds, points) -> mean, low, high (points,): the mean and its 95% bootstrap confidence interval over
    seeds; with a single seed all three are the same."""
    rng = np.random.default_rng(0)
    resampled = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    return values.mean(0), *np.percentile(resampled, [2.5, 97.5], axis=0)


def aligned(runs: list, tag: str) -> tuple:
    """One tag of several seeds on the first run's steps, up to the end of the shortest -> steps, (seeds, points)."""
    series = [run.series(tag) for run in runs]
    series = [(x, y) for x, y in series if len(x)]
    if not series:
        return np.zeros(0), np.zeros((1, 0))
    end = min(x[-1] for x, _ in series)
    steps = series[0][0][series[0][0] <= end]
    return steps, np.stack([np.interp(steps, x, y) for x, y in series])


def aligned_tasks(runs: list, tag: str) -> tuple:
    """As `aligned`, for one arm's runs on several tasks, all on the first task's steps, up to the end of the shortest
    run -> steps (points,), {task: (seeds, points)}."""
    tasks = {task: aligned(seeds, tag) for task, seeds in group(runs, lambda run: run.args["env_id"]).items()}
    end = min(steps[-1] for steps, _ in tasks.values())
    first = next(iter(tasks.values()))[0]
    grid = first[first <= end]
    return grid, {
        task: np.stack([np.interp(grid, steps, line) for line in values]) for task, (steps, values) in tasks.items()
    }


def seeds_of(games: list) -> int | str:
    """For a CSV: games, a list of (seeds, points) -> how many seeds they have, as 3 or 3-5."""
    counts = sorted({len(game) for game in games})
    return counts[0] if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"


def seeds_text(groups, tag: str | None = None) -> str:
    """For a caption, "n seeds" or "n to m seeds": of the runs that have logged the tag, if one is given."""
    counts = sorted({sum(tag is None or len(run.series(tag)[0]) > 0 for run in runs) for runs in groups} - {0}) or [0]
    return f"{counts[0]} seed{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def iqm(games: list) -> np.ndarray:
    """Interquartile mean: games, a list of (seeds, points) -> (points,), the mean of all runs of all games without the
    lowest and the highest quarter of them, as rliable's aggregate_iqm."""
    values = np.sort(np.concatenate(games), axis=0)
    cut = len(values) // 4
    return values[cut : len(values) - cut].mean(0)


def stratified_bootstrap(games: list, statistic, samples: int = 2000) -> tuple:
    """games, a list of (seeds, points) -> low, high (points,): the 95% interval of statistic(games) when the seeds are
    drawn anew within every game."""
    rng = np.random.default_rng(0)
    draws = [statistic([game[rng.integers(len(game), size=len(game))] for game in games]) for _ in range(samples)]
    return tuple(np.percentile(draws, [2.5, 97.5], axis=0))


def panels(count: int, width: float = 3.4, height: float = 2.8, columns: int = 4) -> tuple:
    """A figure with `count` panels in rows of at most `columns` -> figure, list of axes. SystemExit for none."""
    if count == 0:
        raise SystemExit("error: these runs have nothing of what the figure shows")
    columns = min(count, columns)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def frames_unit(last: float) -> tuple:
    """The unit of an axis that ends at so many frames -> its size and its name."""
    return (1e6, "million frames") if last >= 2e5 else (1e3, "thousand frames")


def read_rows(path: str) -> list:
    """The rows of a CSV that `save` has written, with numbers where they are numbers."""

    def value(text):
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            return text

    with open(path) as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def save(figure, rows: list, out: str, note: str = "") -> None:
    """Writes <out>.png with a note below, and the numbers behind it as <out>.csv (dicts with the same keys). SystemExit
    where there are none."""
    if not rows:
        raise SystemExit("error: these runs have logged nothing of what the figure shows yet")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    if out.endswith("_smoke"):  # as sweeps call it
        text = dict(ha="center", va="center", rotation=20, color="red", alpha=0.5, zorder=10)
        text["size"] = min(20, 3 * figure.get_figwidth())
        figure.text(0.5, 0.5, "smoke: checks the plumbing, no result", **text)
    if not figure.get_constrained_layout():
        figure.tight_layout()
    figure.text(0.01, -0.02, note, fontsize=6, color="0.4", va="top")
    figure.savefig(f"{out}.png")
    with open(f"{out}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float | np.floating) else v for k, v in row.items()})
    print(f"wrote {out}.png and {out}.csv")
