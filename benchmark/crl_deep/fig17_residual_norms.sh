#!/usr/bin/env bash
# Fig. 17: mean L2 norm of every block's residual, at the end of training.
# Expect, at paper scale: falling with the block's index in both encoders, less so in the actor.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_room depths="8 16" flags=$SMOKE ;;
  small) seeds=1 envs=humanoid depths="32 64" flags="--total-timesteps 5000000 --eval-every 50000" ;;
  paper) seeds=1 envs=humanoid depths="32 64 128 256" flags="" ;;
esac
sweep crl_deep.py fig17 "$envs" "$seeds" $flags < <(
  for depth in $depths; do echo "d$depth --depth $depth"; done
)
draw benchmark/crl_deep/plot.py fig17 --runs "fig17-$SCALE-*"
