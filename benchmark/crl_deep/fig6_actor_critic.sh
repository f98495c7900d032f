#!/usr/bin/env bash
# Fig. 6: the actor's depth times the critic's, on the final time at goal.
# Expect, at paper scale: both help; in Ant Big Maze the actor more, in Humanoid the critic. Paper: 3 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

depth_tiers
sweep crl_deep.py fig6 "$envs" "$seeds" $flags < <(
  for actor in $depths; do
    for critic in $depths; do echo "a$actor-c$critic --actor-depth $actor --critic-depth $critic"; done
  done
)
draw benchmark/crl_deep/plot.py fig6 --runs "fig6-$SCALE-*"
