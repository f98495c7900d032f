#!/usr/bin/env bash
# Fig. 18: Fig. 3 on Walker Stand, Walker Walk, Walker Run and Reacher Hard.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "walker-stand walker-walk walker-run reacher-hard"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain \
  --tags return fau/encoder fau/actor fau/critic
