#!/usr/bin/env bash
# Fig. 9: the critic over the U4 maze, shallow and deep.
# Expect, at paper scale: depth 4 follows the straight line to the goal, depth 64 the corridor.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_u4_maze depths="4 8" flags=$SMOKE ;;
  small) seeds=1 envs=ant_hardest_maze depths="4 16" flags="--total-timesteps 20000000 --eval-every 200000" ;;
  paper) seeds=1 envs=ant_u4_maze depths="4 64" flags="" ;;
esac
sweep crl_deep.py fig9 "$envs" "$seeds" $flags < <(
  for depth in $depths; do echo "d$depth --depth $depth"; done
)
draw benchmark/crl_deep/plot.py fig9 --runs "fig9-$SCALE-*"
