#!/usr/bin/env bash
# Fig. 3: return and fraction of active units of encoder, actor and critic, with and without augmentation.
# Expect, at paper scale, on Walker Run at 0.3 / 1 / 3M frames: critic .433 / .462 / .418 with, .300 / .258 / .204 without.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "walker-run quadruped-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain \
  --tags return fau/encoder fau/actor fau/critic
