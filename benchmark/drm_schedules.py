"""Figs. 3 and 4 of DrM: what the dormant ratio steers, drawn from drm.py's own functions; no training.

python benchmark/drm_schedules.py --out runs/figures/drm_schedules      [drm.py's flags, as --dormant-temperature 0.05]
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from plotting import panels, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import drm


def draw(args: drm.Args, out: str) -> None:
    """Three panels over the dormant ratio: noise, perturb factor, lambda; a row of the CSV per point."""
    beta = torch.linspace(0, 1, 101, dtype=torch.float64)
    never, awake = torch.tensor(torch.inf), torch.tensor(0.0)
    decayed = {share: torch.tensor(share * args.stddev_steps, dtype=torch.float64) for share in (0, 0.5, 1)}
    curves = {
        "exploration noise sigma": {"before awakening": drm.exploration_std(beta, awake, never, args)} | {
            f"awake, {share:.0%} of the decay": drm.exploration_std(beta, step, awake, args)
            for share, step in decayed.items()},
        "perturb factor alpha": {
            f"at most {largest}": drm.perturb_factor(beta, replace(args, max_perturb_factor=largest))
            for largest in (1.0, 0.9, 0.6)},
        "exploitation lambda": {"": drm.exploitation_lambda(beta, args)},
    }  # fmt: skip
    figure, axes = panels(len(curves))
    rows = []
    for axis, (quantity, lines) in zip(axes, curves.items()):
        for name, values in lines.items():
            axis.plot(beta, values, label=name)
            rows += [dict(quantity=quantity, curve=name, dormant_ratio=b, value=v)
                     for b, v in zip(beta.tolist(), values.tolist())]  # fmt: skip
        axis.axvline(args.target_dormant_ratio, color="0.7", linestyle=":", linewidth=1)
        axis.set(xlabel="dormant ratio", ylabel=quantity, ylim=(0, 1.05))
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=6)
    save(figure, rows, out, "Closed form, from drm.py. Dotted: the target dormant ratio.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="path of the picture and its CSV, without ending")
    options, flags = parser.parse_known_args()
    given = tyro.cli(drm.Args, args=flags)
    draw(replace(given, stddev_steps=given.stddev_steps or drm.MEDIUM["stddev_steps"]), options.out)
