#!/usr/bin/env bash
# Fig. 8: a network that has been learning for long (DQN at replay ratio 2; paper: 1) and a new one learn the q-values of a good
# agent (ReDo at replay ratio 1). The runs of fig7_cpu.sh come first. On a cluster submit that sweep before this one.
# Expect (paper, DemonAttack, 50,000 gradient steps): the new network's loss falls from 7 to 0.1, the old one's from 0.25 to
# 0.16 and rises to 0.7; dormant neurons 18 -> 48% in the new one, 61 -> 98% in the old one.
# Expected here, and written down before the runs: the old network begins with a lower loss and more dormant neurons (by 10
# points, spread 5), and ends with a higher loss than the new one (by a tenth, spread a twentieth) and more dormant neurons.
# With the Adam of its run the old network should differ little: Adam forgets its old moments within some 1000 steps.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/redo_dqn_atari/runs.sh
old=rr2
[ "$SCALE" != paper ] || old=rr1
old_runs redo-rr1 $old rr0.25
wait
extra=() # EXTRA has flags of redo_dqn_atari.py

flags="--gradient-steps 30000 --precision float32"
[ "$SCALE" != paper ] || flags=""
[ "$SCALE" != smoke ] || flags="--gradient-steps 100 --measure-every-gradient-steps 20 --dormant-batch-size 32"
for seed in $seeds; do
  sweep studies/redo_offline.py redo_fig8 - "$seed" --targets teacher --replay "$(old_run redo-rr1 "$seed")" $flags < <(
    echo "new"
    echo "old --student $(old_run $old "$seed")"
    echo "old-rr0.25 --student $(old_run rr0.25 "$seed")" # added when fig7_cpu.sh had shown that it has most dormant neurons
    echo "old-adam --student $(old_run $old "$seed") --keep-adam"
  )
done
draw benchmark/redo_dqn_atari/offline_plot.py --runs "redo_fig8-$SCALE-*"
