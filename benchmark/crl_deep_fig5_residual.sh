#!/usr/bin/env bash
# Fig. 5: depth with and without the residual connections.
# Expect, at paper scale: without them performance falls with depth. Paper: 3 seeds.
source "$(dirname "$0")/common.sh"

case $SCALE in
  smoke) seeds=1 envs=point_room depths="4 8" flags=$SMOKE ;;
  small) seeds=1 envs=ant_hardest_maze depths="4 16" flags="--total-timesteps 20000000" ;;
  paper) seeds="1 2 3" envs="humanoid ant_big_maze" depths="4 8 16 32 64" flags="" ;;
esac
sweep crl_deep.py fig5 "$envs" "$seeds" $flags < <(
  for depth in $depths; do
    echo "d$depth-residual --depth $depth"
    echo "d$depth-plain --depth $depth --no-residual"
  done
)
draw benchmark/plot_crl_deep.py fig5 --runs "fig5-$SCALE-*"
