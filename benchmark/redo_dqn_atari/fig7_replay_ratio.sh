#!/usr/bin/env bash
# Fig. 7: more gradient steps per environment step, more dormant neurons (tau 0), lower return; DQN on DemonAttack.
# Expect, at paper scale, at 40M frames, replay ratio 0.25, 0.5, 1, 2: 9, 23, 38, 48%; return 3650, 2380, 1350, 740.
# DQN alone: it does not matter here that ReDo officially ends at gradient step 2.5M.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

ratio_runs ALE/DemonAttack-v5
draw benchmark/redo_dqn_atari/plot.py fig7 --runs "redo_fig7-$SCALE-*"
