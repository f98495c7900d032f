#!/usr/bin/env bash
# Fig. 10a: DQN and ReDo at replay ratio 0.25, 0.5, 1, 2; IQM of human-normalised scores at 10M frames.
# Expect, at paper scale: DQN 0.41, 0.475, 0.30, 0.09; ReDo 0.40, 0.575, 0.625, 0.54. 17 games, 5 seeds, 680 runs.
# Officially ReDo ends at gradient step 2.5M (difference 9 in the script): of replay ratio 2's 4.96M the second half is
# plain DQN there, here ReDo goes on. To end it, too, run the lines of rr2-redo (--dry-run) with
# --redo-end-gradient-steps 2500000.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "$GAMES17" 2500000
headline_runs
methods_by_ratio redo_fig10a "0.25 0.5 2"
draw benchmark/redo_dqn_atari/plot.py fig10a --runs "redo_fig10a-$SCALE-*" "redo_fig1-$SCALE-dqn" "redo_fig1-$SCALE-redo"
