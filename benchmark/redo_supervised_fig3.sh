#!/usr/bin/env bash
# Fig. 3: supervised learning with fixed labels, with labels that are permuted every 20 epochs, and the latter with ReDo
# (this arm is ours).
# Expect (paper: CIFAR-10, 3 seeds): dormant neurons at tau 0 fall from 9% to 0.7% with fixed labels; permuted labels
# lift them to 29, 41, 39 and 44% at epochs 20, 40, 60, 80, and they end at 32%. After trials on seeds 101 and 102
# (45 epochs at most, Fashion-MNIST) we expect here, with 5 seeds: about 5% at epoch 20, 20 to 35% after the first
# permutation, no further jumps (the network does not learn the permuted labels, accuracy stays near 0.10); below 5% at
# the end with fixed labels; with ReDo less than half as many as without at the end of every phase, and no difference in
# accuracy.
# SCALE=paper: 5 seeds; small: seed 1 alone; both with all 10,000 images and 100 epochs, 3 to 10 minutes a run on a CPU.
source "$(dirname "$0")/common.sh"

seeds=1 flags="" shuffled="" redo="--redo"
[ "$SCALE" != paper ] || seeds="1 2 3 4 5"
if [ "$SCALE" = smoke ]; then
  flags="--data synthetic --num-images 256 --epochs 6 --dormant-batch-size 128"
  shuffled="--shuffle-every-epochs 2" redo="--redo --redo-period-gradient-steps 2"
fi
for seed in $seeds; do # seed by seed: all arms of one are done before the next begins
  sweep studies/redo_supervised.py redo_supervised - "$seed" $flags < <(
    echo "fixed --targets fixed"
    echo "shuffled $shuffled"
    echo "redo $shuffled $redo"
  )
done
draw benchmark/plot_redo_supervised.py --runs "redo_supervised-$SCALE-*"
