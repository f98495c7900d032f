#!/usr/bin/env bash
# Fig. 16: Fig. 7 on five games (which five is our guess). DemonAttack's runs are those of Fig. 7.
# DQN alone: it does not matter here that ReDo officially ends at gradient step 2.5M.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

ratio_runs "$GAMES5"
draw benchmark/redo_dqn_atari/plot.py fig16 --runs "redo_fig7-$SCALE-*"
