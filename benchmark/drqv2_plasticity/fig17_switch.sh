#!/usr/bin/env bash
# Fig. 17: Fig. 6 on six more tasks. Which ones, and that the tasks of 1M frames switch after a third, too, is our guess.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "hopper-hop reacher-hard quadruped-walk"
switches() { # switches "ENVS" STEP
  sweep drqv2_plasticity.py drqv2 "$1" "$seeds" $flags < <(
    echo "augmentation"
    echo "plain --no-augmentation"
    echo "switch-on --no-augmentation --augmentation-switch-step $2"
    echo "switch-off --augmentation-switch-step $2"
  )
}
switches "$envs" "$third"
if [ "$SCALE" = paper ]; then
  easy=$(printf "dm_control/%s-v0 " walker-walk finger-spin hopper-stand)
  switches "$easy" 167000
  envs="$envs $easy"
fi
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain switch-on switch-off \
  --tags return
