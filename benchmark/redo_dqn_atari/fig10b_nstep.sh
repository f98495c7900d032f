#!/usr/bin/env bash
# Fig. 10b: as Fig. 10a, with 3-step returns.
# Expect, at paper scale: DQN 0.655, 0.69, 0.555, 0.345; ReDo 0.69, 0.725, 0.727, 0.565.
# Officially ReDo ends at gradient step 2.5M (difference 9 in the script): of replay ratio 2's 4.96M the second half is
# plain DQN there, here ReDo goes on. To end it, too, run the lines of rr2-redo (--dry-run) with
# --redo-end-gradient-steps 2500000.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "$GAMES17" 2500000
methods_by_ratio redo_fig10b "0.25 0.5 1 2" --n-step 3
draw benchmark/redo_dqn_atari/plot.py fig10b --runs "redo_fig10b-$SCALE-*"
