#!/usr/bin/env bash
# Fig. 3 at small scale on a CPU: Walker Walk with and without augmentation, 30,000 steps (60,000 frames), pictures of 48 x 48,
# heads of 256 units, batches of 64, n-step 3, float32 (--precision bfloat16 only on CPUs with instructions for it: without
# them an update took 8 times as long). SCALE=small: six runs, about 50 minutes each, alone on two cores.
# Expected, and written down before the runs: the critic's active units are higher with augmentation than without by at
# least 0.03 from 20,000 steps on, with a spread of the seeds of about 0.01; the encoder's are equal. (One run of each with
# seed 101 gave 0.546 against 0.476 at 22,500 steps; encoder 0.385 and 0.386 at 42,500.) What came: a spread of 0.045, so
# three seeds cannot tell, see README.md beside this. paper: 5 seeds, 100,000 steps.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

envs=dm_control/walker-walk-v0 seeds="1 2 3" steps=30000
[ "$SCALE" != paper ] || { seeds="1 2 3 4 5" steps=100000; }
flags="--image-size 48 --hidden-dim 256 --batch-size 64 --n-step 3 --stddev-steps 50000 --total-timesteps $steps
  --eval-every 5000 --eval-episodes 3 --plasticity-every 2500 --checkpoint-every 2500"
[ "$SCALE" != smoke ] || pixel_tiers walker-walk
sweep drqv2_plasticity.py drqv2_walker "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2_walker-$SCALE-*" --envs $envs --arms augmentation plain \
  --tags fau/critic fau/encoder fau/actor return
