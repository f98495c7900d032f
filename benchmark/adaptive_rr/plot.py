"""Draws the figures of adaptive_rr.py from the runs under runs/, offline.

    python benchmark/adaptive_rr/plot.py curves --runs "rr-smoke-*" --envs dm_control/quadruped-run-v0 \
        --arms static0.5 static2 adaptive --tags fau/critic charts/replay_ratio --out runs/figures/fig10

KIND is curves (as in drqv2_plasticity/plot.py) or table (Table 1: the last returns, with the paper's). Each figure is
written as PNG with the CSV behind it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import (
    INTERVALS,
    aligned,
    arm,
    group,
    load_module,
    load_runs,
    mean_and_band,
    panels,
    save,
    seeds_text,
    task_name,
)

drq = load_module("drqv2_plasticity/plot.py")

TABLE_FRAMES = 2_000_000
# Table 1, return then: mean, standard deviation over 5 seeds
ARMS = ("static0.5", "static0.5-reset", "static0.5-redo", "static2", "static2-reset", "static2-redo", "adaptive")
TABLE = {
    drq.CHEETAH: ((828, 59), (799, 26), (788, 5), (793, 9), (885, 20), (873, 19), (880, 45)),
    drq.WALKER: ((710, 39), (648, 107), (618, 50), (709, 7), (749, 10), (734, 16), (758, 12)),
    drq.QUADRUPED: ((579, 120), (593, 129), (371, 158), (417, 110), (511, 47), (608, 53), (784, 53)),
}
for (env_id, tag, name), points in list(drq.PAPER.items()):  # the study's names of two arms
    if name in ("augmentation", "rr2"):
        drq.PAPER[(env_id, tag, {"augmentation": "static0.5", "rr2": "static2"}[name])] = points
drq.PAPER |= {
    (drq.QUADRUPED, "fau/critic", "adaptive"): drq.at(0.370, 0.398, 0.439, 0.430, 0.356, 0.291),
    (drq.QUADRUPED, "fau/actor", "adaptive"): drq.at(0.49, 0.40, 0.28, 0.139, 0.100, 0.090),
    (drq.QUADRUPED, "fau/encoder", "adaptive"): drq.at(0.390, 0.366, 0.360, 0.339, 0.348, 0.351),
    (drq.QUADRUPED, "return", "adaptive"): [(1, 480), (1.5, 660), (2, 784), (3, 770)],
    (drq.CHEETAH, "return", "adaptive"): [(2, 880)], (drq.WALKER, "return", "adaptive"): [(2, 758)],
}  # fmt: skip


def table(runs, arms, out) -> None:
    """Table 1 as a picture: a row per arm, a column per task; our mean and its interval, the paper's mean and std.

    Of runs longer than the paper's table, 2M frames, the last evaluation within them counts.
    """
    tasks, rows, cells = group(runs, lambda run: run.args["env_id"]), [], []
    for name in arms:
        line = []
        for env_id, members in tasks.items():
            seeds = [run for run in group(members, arm).get(name, []) if len(run.series("eval/episodic_return")[0])]
            paper = dict(zip(ARMS, TABLE.get(env_id, ()))).get(name, ("", ""))
            text = "-"
            if seeds:
                frames, values = aligned(seeds, "eval/episodic_return")
                last = (frames <= TABLE_FRAMES).nonzero()[0][-1]
                mean, low, high = (band[last] for band in mean_and_band(values))
                text = f"{mean:.0f}" + (f" [{low:.0f}, {high:.0f}]" if len(seeds) > 1 else "")
                text += f" at {frames[last]:,}" if frames[last] < TABLE_FRAMES else ""
                rows.append(dict(arm=name, env_id=env_id, seeds=len(seeds), frames=int(frames[last]), mean=mean,
                                 low=low, high=high, paper_mean=paper[0], paper_std=paper[1]))  # fmt: skip
            line.append(text + (f"\npaper {paper[0]} ± {paper[1]}" if paper[0] else ""))
        cells.append(line)
    figure, (axis,) = panels(1, width=2 + 2.4 * len(tasks), height=0.5 * len(arms) + 1)
    axis.set_axis_off()
    columns = [task_name(env_id) for env_id in tasks]
    axis.table(cells, rowLabels=arms, colLabels=columns, loc="center", cellLoc="center").scale(1, 2.4)
    seeds = seeds_text(group(runs, lambda run: (arm(run), run.args["env_id"])).values())
    axis.set_title(f"return at {TABLE_FRAMES:,} frames, or before, where written; {seeds}")
    save(figure, rows, out, f"Mean and {INTERVALS}; below, the paper's mean and std at 2M frames.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("curves", "table"))
    parser.add_argument("--runs", required=True, help="a shell pattern of --exp-name")
    parser.add_argument("--envs", nargs="+", required=True, help="the tasks")
    parser.add_argument("--arms", nargs="+", required=True, help="the lines or rows, in this order")
    parser.add_argument("--tags", nargs="+", default=["return"], help="the panels of curves")
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    parser.add_argument("--folder", default="runs", help="the folder of the runs")
    a = parser.parse_args()
    runs = drq.select(load_runs(a.runs, folder=a.folder), a.envs, a.arms)
    if a.kind == "table":
        table(runs, a.arms, a.out)
    else:
        drq.curves(drq.all_rows(runs, a.tags), a.arms, a.out)


if __name__ == "__main__":
    main()
