#!/usr/bin/env bash
# Fig. 10c: as Fig. 10a, with the ResNet.
# Expect, at paper scale: DQN 0.79, 0.78, 0.51, 0.22; ReDo 0.83, 1.0, 0.84, 0.53.
# Officially ReDo ends at gradient step 2.5M (difference 9 in the script): of replay ratio 2's 4.96M the second half is
# plain DQN there, here ReDo goes on. To end it, too, run the lines of rr2-redo (--dry-run) with
# --redo-end-gradient-steps 2500000.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers "$GAMES17" 2500000
methods_by_ratio redo_fig10c "0.25 0.5 1 2" --network resnet
draw benchmark/redo_dqn_atari/plot.py fig10c --runs "redo_fig10c-$SCALE-*"
