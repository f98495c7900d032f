#!/usr/bin/env bash
# Fig. 16: Fig. 5 on Cheetah Run and Quadruped Run.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "cheetah-run quadruped-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(injection_arms)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs \
  --arms augmentation augmentation-inject-actor augmentation-inject-critic switch-on switch-on-inject-actor switch-on-inject-critic \
  --tags return fau/critic
