#!/usr/bin/env bash
# Table 7: the rank of the penultimate layer's features on DemonAttack, DQN and ReDo; runs of Fig. 1.
# Expect, at paper scale, at 10M frames: DQN 449.2, ReDo 470.8, of 512 (the paper does not say its replay ratio; here: 1).
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

atari_tiers ALE/DemonAttack-v5 2500000
headline_runs
draw benchmark/redo_dqn_atari/plot.py table7 --runs "redo_fig1-$SCALE-*"
