#!/usr/bin/env bash
# Fig. 17: dormant neurons of DrQ(eps) by replay ratio (tau 0). We do not know which games the paper shows.
# Expect (paper, as read by others): 8 to 16%.
# SCALE=small, for two cores: Asterix, 100,000 steps, a quarter of the width, no padding, replay ratio 1 and 2, 2 seeds.
# Expected there, and written down before the runs: more dormant neurons at replay ratio 2, by at least 3 points at the end,
# with a spread of 2 points over seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

drq_tiers "ALE/Asterix-v5 ALE/DemonAttack-v5" "1 2 3 4 5 6 7 8 9 10"
ratios="1 2"
[ "$SCALE" != paper ] || ratios="1 2 4 8"
sweep studies/drq_eps_atari.py drq_fig17 "$envs" "$seeds" $flags < <(
  for ratio in $ratios; do echo "rr$ratio --method drq --replay-ratio $ratio"; done
)
draw benchmark/redo_dqn_atari/plot.py drq_fig17 --runs "drq_fig17-$SCALE-*"
