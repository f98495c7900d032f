#!/usr/bin/env bash
# Fig. 10: phi(s, a) along one successful episode, first three principal components, shallow and deep.
# Expect, at paper scale: depth 4 puts an episode on a clump, depth 64 spreads it on a curved surface.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_room depths="4 8" flags=$SMOKE ;;
  small) seeds=1 envs=ant_hardest_maze depths="4 16" flags="--total-timesteps 20000000 --eval-every 200000" ;;
  paper) seeds=1 envs=humanoid depths="4 64" flags="" ;;
esac
sweep crl_deep.py fig10 "$envs" "$seeds" $flags < <(
  for depth in $depths; do echo "d$depth --depth $depth"; done
)
draw benchmark/crl_deep/plot.py fig10 --runs "fig10-$SCALE-*"
