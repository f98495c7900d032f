#!/usr/bin/env bash
# Fig. 19: Fig. 3 on Hopper Stand, Hopper Hop, Finger Spin, Quadruped Walk and Quadruped Run.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "hopper-stand hopper-hop finger-spin quadruped-walk quadruped-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain \
  --tags return fau/encoder fau/actor fau/critic
