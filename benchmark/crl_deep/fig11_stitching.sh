#!/usr/bin/env bash
# Fig. 11: training on start-goal pairs at most 3 cells apart, evaluated on goals 4 to 6 cells away.
# Expect, at paper scale: depth 4 about 171, depth 16 about 240, depth 64 about 357 steps at the goal. Paper: 3 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_u_maze_gen_1f2f3f depths="4 8" flags=$SMOKE ;;
  small) seeds=1 envs=ant_u_maze_gen_1f2f3f depths="4 16" flags="--total-timesteps 20000000 --eval-every 200000" ;;
  paper) seeds="1 2 3" envs=ant_u_maze_gen_1f2f3f depths="4 16 64" flags="" ;;
esac
sweep crl_deep.py fig11 "$envs" "$seeds" $flags < <(
  for depth in $depths; do echo "d$depth --depth $depth"; done
)
draw benchmark/crl_deep/plot.py fig11 --runs "fig11-$SCALE-*"
