#!/usr/bin/env bash
# Fig. 12: Fig. 1 on six more tasks (which ones is our guess), 10 resets.
source "$(dirname "$0")/common.sh"

pixel_tiers "hopper-hop reacher-hard quadruped-walk walker-walk finger-spin hopper-stand"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
  echo "augmentation-reset10 --reset-times 10"
  echo "plain-reset10 --no-augmentation --reset-times 10"
)
draw benchmark/plot_drqv2_plasticity.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain augmentation-reset10 plain-reset10 \
  --tags return
