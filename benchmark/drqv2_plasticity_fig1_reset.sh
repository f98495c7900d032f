#!/usr/bin/env bash
# Fig. 1: data augmentation x resets. Without augmentation resets help a lot; with it they help little or harm.
# 10 resets, 5 on Quadruped Run, where 10 let it collapse. What is reset: see --reset-scope.
source "$(dirname "$0")/common.sh"

pixel_tiers "cheetah-run walker-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
  echo "augmentation-reset10 --reset-times 10"
  echo "plain-reset10 --no-augmentation --reset-times 10"
)
if [ "$SCALE" = paper ]; then
  sweep drqv2_plasticity.py drqv2 dm_control/quadruped-run-v0 "$seeds" $flags < <(
    echo "augmentation"
    echo "plain --no-augmentation"
    echo "augmentation-reset5 --reset-times 5"
    echo "plain-reset5 --no-augmentation --reset-times 5"
  )
  envs="$envs dm_control/quadruped-run-v0"
fi
draw benchmark/plot_drqv2_plasticity.py curves --runs "drqv2-$SCALE-*" --envs $envs \
  --arms augmentation plain augmentation-reset10 plain-reset10 augmentation-reset5 plain-reset5
