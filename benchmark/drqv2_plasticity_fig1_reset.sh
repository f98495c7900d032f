#!/usr/bin/env bash
# Fig. 1: data augmentation x resets. Without augmentation resets help a lot; with it they help little or harm.
# The paper's 10 resets: 9 in effect, the tenth falls on the end of the run (5 on Quadruped Run, where 10 let it collapse:
# 4). What is reset: see --reset-scope.
source "$(dirname "$0")/common.sh"

pixel_tiers "cheetah-run walker-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
  echo "augmentation-reset9 --reset-times 9"
  echo "plain-reset9 --no-augmentation --reset-times 9"
)
if [ "$SCALE" = paper ]; then
  sweep drqv2_plasticity.py drqv2 dm_control/quadruped-run-v0 "$seeds" $flags < <(
    echo "augmentation"
    echo "plain --no-augmentation"
    echo "augmentation-reset4 --reset-times 4"
    echo "plain-reset4 --no-augmentation --reset-times 4"
  )
  envs="$envs dm_control/quadruped-run-v0"
fi
draw benchmark/plot_drqv2_plasticity.py curves --runs "drqv2-$SCALE-*" --envs $envs \
  --arms augmentation plain augmentation-reset9 plain-reset9 augmentation-reset4 plain-reset4
