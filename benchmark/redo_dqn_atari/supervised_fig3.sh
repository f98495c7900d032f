#!/usr/bin/env bash
# Fig. 3: supervised learning with fixed labels, and with labels that are shuffled every 20 epochs: either permuted among
# the images ("shuffled") or among the classes ("relabelled"); we do not know which the paper means. Both with ReDo, too
# (these arms are ours).
# Expect (paper: CIFAR-10, 3 seeds): dormant neurons at tau 0 fall from 9% to 0.7% with fixed labels; shuffled labels
# lift them to 29, 41, 39 and 44% at epochs 20, 40, 60, 80, and they end at 32%. After trials on seeds 101 and 102
# (62 epochs at most, Fashion-MNIST) we expect here, with 5 seeds:
#   fixed: about 5% at epoch 20, below 5% at the end
#   shuffled: 20 to 35% after the first permutation and no further jumps: the network does not learn the permuted labels
#   relabelled: a rise by 5 to 15 points at every change, less in between; accuracy returns to 0.8 in every phase
#   ReDo: less than half as many as without at the end of every phase; no lower accuracy
# SCALE=paper: 5 seeds; small: seed 1 alone; both with all 10,000 images and 100 epochs, 5 minutes a run on a free core.
sweep_name=redo_supervised_fig3 # the study is named, not the script
source "$(dirname "$(realpath "$0")")/../common.sh"

seeds=1 flags="" period="" redo="--redo"
[ "$SCALE" != paper ] || seeds="1 2 3 4 5"
if [ "$SCALE" = smoke ]; then
  flags="--data synthetic --num-images 256 --epochs 6 --dormant-batch-size 128"
  period="--shuffle-every-epochs 2" redo="--redo --redo-period-gradient-steps 2"
fi
for seed in $seeds; do # seed by seed: all arms of one are done before the next begins
  sweep studies/redo_supervised.py redo_supervised - "$seed" $flags < <(
    echo "fixed --targets fixed"
    echo "shuffled $period"
    echo "relabelled --targets relabelled $period"
    echo "shuffled-redo $period $redo"
    echo "relabelled-redo --targets relabelled $period $redo"
  )
done
draw benchmark/redo_dqn_atari/supervised_plot.py --runs "redo_supervised-$SCALE-*"
