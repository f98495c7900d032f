"""Figs. 3 and 4 of DrM: what the dormant ratio steers, drawn from drm.py's own functions; no training.

python benchmark/drm/schedules.py --out runs/figures/drm_schedules [flags of drm.py, as --env-id dm_control/dog-run-v0]
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plotting import panels, save

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import drm


def draw(args: drm.Args, out: str) -> None:
    """Three panels over the dormant ratio: noise, perturb factor, lambda; a row of the CSV per point."""
    beta, target = torch.linspace(0, 1, 101, dtype=torch.float64), args.target_dormant_ratio
    decays = {"before awakening": 0.0}
    for share in (0, 0.5, 1):
        decays[f"awake, {share:.0%} of the decay"] = args.stddev_start + share * (args.stddev_end - args.stddev_start)
    curves = {
        "exploration noise sigma": {
            name: drm.exploration_std(beta, target, args.dormant_temperature, torch.tensor(lowest, dtype=beta.dtype))
            for name, lowest in decays.items()},
        "perturb factor alpha": {
            f"at most {highest}": drm.perturb_factor(beta, args.perturb_rate, args.min_perturb_factor, highest)
            for highest in sorted({1.0, 0.9, 0.6, args.max_perturb_factor}, reverse=True)},
        "exploitation lambda": {
            "": drm.exploitation_lambda(beta, target, args.lambda_temperature, args.target_lambda)},
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
    draw(drm.parse_args(flags), options.out)
