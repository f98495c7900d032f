#!/usr/bin/env bash
# Fig. 6: augmentation switched on or off after a third of the training (1M frames). Expect, at paper scale, at 3M frames,
# always / before only / never / after only: Cheetah 880, 865, 270, 275; Walker 757, 760, 165, 230; Quadruped 640, 555, 250,
# 300. So early augmentation is what counts.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "cheetah-run walker-run quadruped-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
  echo "switch-on --no-augmentation --augmentation-switch-step $third"
  echo "switch-off --augmentation-switch-step $third"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain switch-on switch-off \
  --tags return fau/critic
