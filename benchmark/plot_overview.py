"""Draws the picture at the top of README.md from the CSVs of the scripts' results.

python benchmark/plot_overview.py --out benchmark/results/overview
"""

import argparse
from pathlib import Path

from plotting import panels, read_rows, save

BENCHMARK = Path(__file__).resolve().parent
# title, y axis, CSV (<script>_cpu_small), environment, tag, {arm: label}: the baseline (blue), the method (orange)
PANELS = (
    ("redo_dqn_atari.py: recycling dormant neurons\nRoadRunner, replay ratio 1", "dormant neurons (tau 0.1)",
     "redo_dqn_atari_cpu_small", "ALE/RoadRunner-v5", "dormant_ratio_tau0.1/all",
     {"dqn": "DQN", "redo": "ReDo"}),
    ("drqv2_plasticity.py: data augmentation\nCartpole Balance", "return", "drqv2_plasticity_cpu_small",
     "dm_control/cartpole-balance-v0", "return", {"plain": "without", "augmentation": "with augmentation"}),
    ("adaptive_rr.py: learn more when this settles\nCartpole Balance (switch at 14)", "the critic's active units",
     "adaptive_rr_cpu_small", "dm_control/cartpole-balance-v0", "fau/critic",
     {"static0.5": "replay ratio 0.5", "adaptive": "adaptive replay ratio"}),
    ("drm.py: steered by the dormant ratio\nCartpole Balance (perturbed at 12 and 24)", "the actor's dormant ratio",
     "drm_cpu_small", "dm_control/cartpole-balance-v0", "drm/dormant_ratio", {"drqv2": "DrQ-v2", "drm-0.6": "DrM"}),
)  # fmt: skip


def draw(out: str) -> None:
    figure, axes = panels(len(PANELS))
    rows = []
    for axis, (title, label, name, env_id, tag, arms) in zip(axes, PANELS):
        table = read_rows(BENCHMARK / name.removesuffix("_cpu_small") / "results" / f"{name}.csv")
        table = [row for row in table if (row["env_id"], row["tag"]) == (env_id, tag)]
        for arm, text in arms.items():
            points = [(row["frames"], row["mean"]) for row in table if row["arm"] == arm and row["seeds"] == 1]
            axis.plot(*zip(*[(frames / 1e3, value) for frames, value in points]), label=text, linewidth=1)
            rows += [dict(panel=name, arm=arm, tag=tag, frames=x, value=y) for x, y in points]
        axis.set_title(title, fontsize=8)
        axis.set(xlabel="thousand frames", ylabel=label)
        axis.legend(frameon=False, fontsize=7)
    save(figure, rows, out, "One seed each, on two CPU cores; what these runs show, and do not: benchmark/README.md.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    draw(parser.parse_args().out)
