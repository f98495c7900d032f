#!/usr/bin/env bash
# Fig. 4: the same data, with targets that move and with targets that do not. The runs of fig7_cpu.sh come first (the
# data are those of DQN at replay ratio 0.25). On a cluster submit that sweep before this one.
# Expect (paper, 6.25M gradient steps, tau 0): 34% with bootstrapped targets on DemonAttack, 25% with random ones, which first
# fall to 6%; 54 and 20% on Asterix (that of the smaller scales). Monte-Carlo targets are ours.
# Expected here, and written down before the runs: more dormant neurons with bootstrapped than with random targets at the
# end, by at least 5 points, with a spread over seeds of 4; Monte-Carlo between them.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh
old_runs rr0.25
wait
extra=() # EXTRA has flags of redo_dqn_atari.py

flags="--gradient-steps 100000 --measure-every-gradient-steps 2000 --precision float32"
[ "$SCALE" != paper ] || flags="--gradient-steps 6250000 --measure-every-gradient-steps 20000"
[ "$SCALE" != smoke ] || flags="--gradient-steps 100 --measure-every-gradient-steps 20 --dormant-batch-size 32"
for seed in $seeds; do
  sweep studies/redo_offline.py redo_fig4 - "$seed" --replay "$(old_run rr0.25 "$seed")" $flags < <(
    for targets in bootstrapped random monte-carlo; do echo "$targets --targets $targets"; done
  )
done
draw benchmark/redo_dqn_atari/offline_plot.py --runs "redo_fig4-$SCALE-*"
