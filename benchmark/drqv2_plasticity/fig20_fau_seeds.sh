#!/usr/bin/env bash
# Fig. 20: Fig. 3 seed by seed, on six tasks.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "cheetah-run walker-run quadruped-walk quadruped-run hopper-hop reacher-hard"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
)
draw benchmark/drqv2_plasticity/plot.py seeds --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain \
  --tags return fau/encoder fau/actor fau/critic
