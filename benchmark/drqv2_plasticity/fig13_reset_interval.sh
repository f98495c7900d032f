#!/usr/bin/env bash
# Fig. 13: the number of resets; the effect depends strongly on it. The list of numbers (the paper's 10 is 9 in effect, the
# tenth falls on the end of the run) and Walker Run are our guess.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "quadruped-run walker-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(reset_arms $steps "1 4 9 19")
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs \
  --arms augmentation plain augmentation-reset1 plain-reset1 augmentation-reset4 plain-reset4 augmentation-reset9 plain-reset9 augmentation-reset19 plain-reset19 \
  --tags return
