"""Where other detectors would have raised the replay ratio: logged fractions of active units, replayed, offline.

    python benchmark/adaptive_rr/detector.py --runs "rr-paper-static0.5" --out runs/figures/adaptive_rr_detector

For every run of adaptive_rr.py whose --exp-name matches, and every interval and threshold, the frame where
adaptive_rr.PlateauDetector would have switched. Best asked of static runs at the low replay ratio. A run that switched
itself is replayed up to its own switch only: what comes later belongs to another replay ratio.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import arm, group, load_runs, panels, save, task_name

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from adaptive_rr import PlateauDetector

FAU = "fau/critic"


def own_switch(run) -> float:
    """The frame at which the run's replay ratio was raised: the end of its last episode at the low one; infinite for
    never."""
    frames, switched = run.series("adaptive_rr/switched")
    return max(frames[switched == 0], default=0) if (switched > 0).any() else math.inf


def switch_frame(run, interval: int, threshold: float) -> float:
    """The frame where a detector with these settings would have switched on a run's logged FAU; NaN for never."""
    detector, end = PlateauDetector(interval, threshold), own_switch(run)
    detector.first_batch(run.series("adaptive_rr/reference")[1][0])
    fau = dict(zip(*run.series(FAU)))  # of the episodes with gradient steps
    for frame in run.series("charts/episodic_return")[0]:
        if frame <= end:
            detector.end_episode(fau.get(frame))
            if detector.switched:
                return float(frame)
    return math.nan


def draw(runs, intervals, thresholds, out) -> None:
    """Two panels per task: the FAU per episode of every run; the switch over the threshold, a line per interval, a
    point per run. A row of the CSV per run and setting. SystemExit where no run has a finished episode."""
    runs = [run for run in runs if len(run.series(FAU)[0]) and len(run.series("adaptive_rr/reference")[0])]
    if not runs:
        raise SystemExit("error: no run is long enough for an episode's fraction of active units")
    tasks, rows = group(runs, lambda run: run.args["env_id"]), []
    figure, axes = panels(2 * len(tasks), columns=2, width=4.4, height=3.2)
    for k, (env_id, members) in enumerate(tasks.items()):
        curves, switches = axes[2 * k], axes[2 * k + 1]
        for i, run in enumerate(members):
            frames, faus = run.series(FAU)
            label = f"{arm(run)}, seed {run.args['seed']}"
            curves.plot(frames / 1e6, faus, linewidth=1, color=f"C{i}", label=label)
            if own_switch(run) < math.inf:
                curves.axvline(own_switch(run) / 1e6, color=f"C{i}", linestyle=":", linewidth=1)
        for i, interval in enumerate(intervals):
            points = []
            for run in members:
                for threshold in thresholds:
                    frame = switch_frame(run, interval, threshold)
                    points.append((threshold * 1.06 ** (i - 1), frame / 1e6))
                    rows.append(dict(env_id=env_id, exp_name=run.args["exp_name"], seed=run.args["seed"],
                                     check_episodes=interval, threshold=threshold,
                                     switch_frame=frame, own_switch_frame=own_switch(run)))  # fmt: skip
            never = sum(math.isnan(frame) for _, frame in points)
            label = f"every {interval} episodes" + (f" ({never} of {len(points)} never)" if never else "")
            switches.plot(*zip(*points), "o", ms=4, color=f"C{i}", label=label)
        task = task_name(env_id)
        curves.set(title=task, xlabel="million frames", ylabel="the critic's FAU per episode")
        switches.set(title=f"{task}: first switch", xlabel="threshold", ylabel="million frames", xscale="log")
        for axis in (curves, switches):
            axis.legend(frameon=False, fontsize=6)
    save(figure, rows, out, "Dotted: where a run switched itself; it is replayed up to there. Points: one per run.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="a shell pattern of --exp-name")
    parser.add_argument("--intervals", nargs="+", type=int, default=[25, 50, 100], help="episodes between checks")
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.0003, 0.001, 0.003, 0.01])
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    a = parser.parse_args()
    draw(load_runs(a.runs, folder=a.folder), a.intervals, a.thresholds, a.out)


if __name__ == "__main__":
    main()
