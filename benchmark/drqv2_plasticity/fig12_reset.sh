#!/usr/bin/env bash
# Fig. 12: Fig. 1 on six more tasks (which ones is our guess), the paper's 10 resets: 9 in effect.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "hopper-hop reacher-hard quadruped-walk"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(reset_arms $steps 9)
if [ "$SCALE" = paper ]; then
  easy=$(printf "dm_control/%s-v0 " walker-walk finger-spin hopper-stand)
  sweep drqv2_plasticity.py drqv2 "$easy" "$seeds" $flags < <(reset_arms 500500 9)
  envs="$envs $easy"
fi
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain augmentation-reset9 plain-reset9 \
  --tags return
