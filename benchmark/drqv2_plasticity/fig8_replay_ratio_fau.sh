#!/usr/bin/env bash
# Fig. 8: the critic's fraction of active units by replay ratio, Quadruped Run. Expect, at paper scale, at 0.3 / 1 / 3M
# frames: replay ratio 0.5 .415 / .453 / .382, replay ratio 2 .338 / .300 / .221; at 4 it does not recover.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "quadruped-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(replay_ratio_arms)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation rr1 rr2 rr4 \
  --tags fau/critic return
