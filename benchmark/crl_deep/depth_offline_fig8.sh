#!/usr/bin/env bash
# Ours, in the spirit of Fig. 8 (learners of different depth on the same data) and Fig. 4 (depth against width): a point
# mass in a maze, fixed data, the critic alone, a greedy policy. Fig. 9: the value maps of the shallowest and the deepest.
# Expected, and written down before the runs, from trials on other seeds (1 to 6): held-out loss 5.15, 5.10, 5.08, 5.06 at
# depth 4, 8, 16, 32, with a spread over seeds of 0.005; goals reached .55, .65, .66, .77 with a spread of .06. Width 64
# has as many weights as depth 16 and should lie below it (5.11, .64), 14,000 gradient steps at depth 4 take as long as
# 6000 at depth 16 (5.10, .70). For the second maze and the second set of data: the same order, by at least 0.03.
# SCALE=paper: 5 seeds, about 2 core-hours; small: seed 11 alone.
sweep_name=crl_depth_offline_fig8 # the study is named, not the script
source "$(dirname "$(realpath "$0")")/../common.sh"

seeds=11 flags="" long=14000
[ "$SCALE" != paper ] || seeds="11 12 13 14 15"
[ "$SCALE" != smoke ] || { long=60 flags="--gradient-steps 40 --num-paths 64 --eval-every 20 --eval-episodes 32"; }
few() { if [ "$SCALE" = smoke ]; then grep -E "^(depth4|depth32|width64|longer|data2-depth32|big_maze-depth32) "; else cat; fi; }
for seed in $seeds; do # seed by seed: all arms of one are done before the next begins
  sweep studies/crl_depth_offline.py depth - "$seed" $flags < <(few < <(
    for depth in 4 8 16 32; do echo "depth$depth --depth $depth"; done
    echo "width64 --width 64"
    echo "width128 --width 128"
    echo "longer --gradient-steps $long"
    echo "data2-depth4 --data-seed 2"
    echo "data2-depth32 --data-seed 2 --depth 32"
    echo "big_maze-depth4 --maze big_maze"
    echo "big_maze-depth16 --maze big_maze --depth 16"
    echo "big_maze-depth32 --maze big_maze --depth 32"
  ))
done
draw benchmark/crl_deep/depth_offline_plot.py --runs "depth-$SCALE-*"
