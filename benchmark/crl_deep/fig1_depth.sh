#!/usr/bin/env bash
# Fig. 1 and Table 1: time at goal over environment steps for depth 4 to 64 (without the three arm panels).
# Expect, at paper scale: depth 64 has 1.8 (Ant Hardest) to 1051 times (Humanoid Big) depth 4's score; Ant Big and Ant
# Hardest level off at depth 16. Paper: 5 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds="1 2" envs=point_room depths="4 8" flags=$SMOKE ;;
  small) seeds=1 envs=ant_hardest_maze depths="4 16" flags="--total-timesteps 20000000 --eval-every 200000" ;;
  paper) seeds="1 2 3 4 5" depths="4 8 16 32 64" flags=""
    envs="ant_big_maze ant_hardest_maze ant_u4_maze ant_u5_maze humanoid humanoid_u_maze humanoid_big_maze" ;;
esac
sweep crl_deep.py fig1 "$envs" "$seeds" $flags < <(
  for depth in $depths; do echo "d$depth --depth $depth"; done
)
draw benchmark/crl_deep/plot.py fig1 --runs "fig1-$SCALE-*"
