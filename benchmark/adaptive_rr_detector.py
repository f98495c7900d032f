"""Where other detectors would have raised the replay ratio: logged fractions of active units, replayed, offline.

    python benchmark/adaptive_rr_detector.py --runs "rr-paper-*" --out runs/figures/adaptive_rr_detector

For every run of adaptive_rr.py whose --exp-name matches: the critic's fraction of active units (FAU) per episode, and a
mark for every interval, window and threshold where adaptive_rr.PlateauDetector would have switched first. In a run that
has itself switched, what comes after its own switch belongs to the high replay ratio; static runs have no such break.
"""

import argparse
import math
import sys
from pathlib import Path

from plotting import load_runs, panels, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_rr import PlateauDetector


def switch_frame(run, interval: int, window: int, threshold: float) -> float:
    """The frame where a detector with these settings would have switched on a run's logged FAU; NaN for never."""
    episode_ends = run.series("charts/episodic_return")[0].tolist()
    detector = PlateauDetector(interval, window, threshold)
    detector.reference = run.series("adaptive_rr/fau_first")[1][0]
    for frame, fau in zip(*run.series("adaptive_rr/fau_episode")):
        check = detector.end_episode(episode_ends.index(frame) + 1, float(fau))
        if check is not None and check[2]:
            return float(frame)
    return math.nan


def draw(runs, intervals, windows, thresholds, out) -> None:
    """A panel per run and a row of the CSV per run and setting. SystemExit where no run has a finished episode."""
    runs = [run for run in runs if len(run.series("adaptive_rr/fau_episode")[0])]
    if not runs:
        raise SystemExit("error: no run is long enough for an episode's fraction of active units")
    settings = [(i, w, t) for i in intervals for w in windows if w < i for t in thresholds]
    figure, axes = panels(len(runs), columns=3, width=4.4, height=1.6 + 0.16 * len(settings))
    rows = []
    for axis, run in zip(axes, runs):
        env_id, name, seed = (run.args[key] for key in ("env_id", "exp_name", "seed"))
        frames, faus = run.series("adaptive_rr/fau_episode")
        axis.plot(frames / 1e6, faus, color="0.3", linewidth=1)
        span = max(faus.max() - faus.min(), 0.01)
        for k, (interval, window, threshold) in enumerate(settings):
            frame, place = switch_frame(run, interval, window, threshold), faus.max() + span * (0.15 + 0.12 * k)
            color = f"C{thresholds.index(threshold)}"
            axis.plot([frame / 1e6], [place], "|", ms=7, mew=2, color=color)
            text = f"{interval} / {window} / {threshold:g}" + (": never" if math.isnan(frame) else "")
            axis.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), fontsize=6, va="center",
                          color=color)  # fmt: skip
            rows.append(dict(env_id=env_id, exp_name=name, seed=seed, check_episodes=interval, window_episodes=window,
                             threshold=threshold, switch_frame=frame))  # fmt: skip
        task = env_id.removeprefix("dm_control/").removesuffix("-v0")
        axis.set(title=f"{task}, {name}, seed {seed}", xlabel="million frames", ylabel="the critic's FAU")
        axis.locator_params(axis="x", nbins=4)
    note = "Line: the critic's FAU per episode. Marks: the first switch by interval / window (episodes) / threshold."
    save(figure, rows, out, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="a shell pattern of --exp-name")
    parser.add_argument("--intervals", nargs="+", type=int, default=[25, 50, 100], help="episodes between checks")
    parser.add_argument("--windows", nargs="+", type=int, default=[1, 10], help="episodes averaged")
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.0003, 0.001, 0.003, 0.01])
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    a = parser.parse_args()
    draw(load_runs(a.runs, a.folder), a.intervals, a.windows, a.thresholds, a.out)


if __name__ == "__main__":
    main()
