#!/usr/bin/env bash
# Fig. 7 on two cores: dormant neurons at replay ratio 0.25, 1 and 2, DQN with a quarter of the width on Asterix; and ReDo
# at replay ratio 1, whose agent teaches in Fig. 8. The target network is copied every 1000 steps, not 8000, so that
# something is learned in 40,000 steps.
# Expect (paper, DemonAttack, 10M steps, tau 0, replay ratio 0.25, 0.5, 1, 2): 9, 23, 38, 48%; return 3650, 2380, 1350, 740.
# Trials (seed 101, replay ratio 1, 15,000 gradient steps, copied every 8000 steps) went from 27 to 45% on RoadRunner, whose
# rewards are too rare to learn from so soon, from 9 to 16% on Asterix and from 0 to 2% on DemonAttack.
# Expected here, and written down before the runs: the share of dormant neurons rises with the replay ratio, by at least
# 5 points from 0.25 to 2 after 40,000 steps, with a spread over seeds of 4; ReDo below 5%; nothing about returns.
# SCALE=small: 3 seeds, 40,000 steps, about 1.5 core-hours. paper: DemonAttack, the paper's network, 10M steps, 5 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh

old_runs redo-rr1 rr2 rr0.25 rr1
draw benchmark/redo_dqn_atari/plot.py fig7_cpu --runs "redo_old-$SCALE-*"
