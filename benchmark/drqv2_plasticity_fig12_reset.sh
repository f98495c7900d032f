#!/usr/bin/env bash
# Fig. 12: Fig. 1 on six more tasks (which ones is our guess), the paper's 10 resets: 9 in effect.
source "$(dirname "$0")/common.sh"

pixel_tiers "hopper-hop reacher-hard quadruped-walk walker-walk finger-spin hopper-stand"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
  echo "augmentation-reset9 --reset-times 9"
  echo "plain-reset9 --no-augmentation --reset-times 9"
)
draw benchmark/plot_drqv2_plasticity.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain augmentation-reset9 plain-reset9 \
  --tags return
