#!/usr/bin/env bash
# Fig. 5: plasticity injection into actor or critic at a third of the training, where augmentation is switched on in the
# runs that began without it. Expect, at paper scale, at 3M frames: without augmentation before, no injection 230, actor
# 290, critic 635; with augmentation always, 757 to 772.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "walker-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(injection_arms)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs \
  --arms augmentation augmentation-inject-actor augmentation-inject-critic switch-on switch-on-inject-actor switch-on-inject-critic \
  --tags return fau/critic
