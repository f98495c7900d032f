#!/usr/bin/env bash
# Fig. 7: replay ratio 0.5 (augmentation), 1, 2, 4, all with augmentation: 1 is best or as good, then it gets worse.
# Which tasks is our guess. Expect, at paper scale, at 2M frames, for 0.5 / 2: 828 / 793, 710 / 709, 579 / 417.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "cheetah-run walker-run quadruped-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(replay_ratio_arms)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation rr1 rr2 rr4 \
  --tags return
