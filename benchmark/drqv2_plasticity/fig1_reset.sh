#!/usr/bin/env bash
# Fig. 1: data augmentation x resets. Without augmentation resets help a lot; with it they help little or harm.
# The paper's 10 resets: 9 in effect, the tenth falls on the end of the run (5 on Quadruped Run, where 10 let it collapse:
# 4). Trunks and heads are reset, as in the code of Nikishin et al.; their text says the last layers.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "cheetah-run walker-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(reset_arms $steps 9)
if [ "$SCALE" = paper ]; then
  sweep drqv2_plasticity.py drqv2 dm_control/quadruped-run-v0 "$seeds" $flags < <(reset_arms $steps 4)
  envs="$envs dm_control/quadruped-run-v0"
fi
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs \
  --arms augmentation plain augmentation-reset9 plain-reset9 augmentation-reset4 plain-reset4
