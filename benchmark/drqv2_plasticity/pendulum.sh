#!/usr/bin/env bash
# Figs. 1, 3, 6 and 15 at small scale on a CPU: Pendulum-v1 of Gymnasium from pixels: augmentation on, off and switched at a
# third; after heavy priming; with two resets. 6000 steps (12,000 frames, 60 episodes) at a replay ratio of 2, pictures of
# 36 x 36 shifted by up to 2 pixels, heads of 256 units, batches of 64; 10,000 gradient steps of priming on the first 500
# transitions instead of 100,000 on 2000. SCALE=small: 24 runs of 8 to 17 minutes. paper: twice as many seeds.
# Expected, and written down before the runs, of the mean return of the last three evaluations, over seeds: augmentation
# above -400, plain below -1000, with a spread of 150; the critic's active units cannot be told apart (0.54 and 0.51).
# Both primed arms end above -600: with augmentation from then on, priming without it does no lasting harm (Fig. 15).
# switch-off stays within 200 of augmentation, switch-on ends 200 or more below it (Fig. 6: the early steps decide).
# Resets do not help plain (not the paper's result), and cost augmentation 0 to 300.
# (Tried on seed 101: plain -1220 after 4000 steps, with resets -1524 after 5000. What augmentation reaches at this replay
# ratio is known from ../adaptive_rr/pendulum.sh: -202 after 8000 steps.)
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

envs=Pendulum-v1 seeds="11 12 13" priming=10000 after=501 third=2000
flags="--total-timesteps 6000 --image-size 36 --hidden-dim 256 --batch-size 64 --learning-rate 3e-4 --precision bfloat16
  --learning-starts 500 --exploration-steps 500 --stddev-steps 5000 --replay-ratio 2 --eval-every 1000 --eval-episodes 10
  --plasticity-every 500 --checkpoint-every 1000"
[ "$SCALE" != smoke ] || { pixel_tiers none; envs=Pendulum-v1 priming=50 after=101 third=600; }
[ "$SCALE" != paper ] || seeds="11 12 13 14 15 16"
shift="--shift-pad 2" off="--no-augmentation"
for seed in $seeds; do # seed by seed: these arms of one are done before the next begins
  sweep drqv2_plasticity.py drqv2_pendulum "$envs" "$seed" $flags < <(
    echo "augmentation $shift"
    echo "plain $off"
    echo "primed-augmentation $shift --priming-gradient-steps $priming"
    echo "primed-plain-then-augmentation $off $shift --priming-gradient-steps $priming --augmentation-switch-step $after"
  )
done
sweep drqv2_plasticity.py drqv2_pendulum "$envs" "$seeds" $flags < <(
  echo "plain-reset2 $off --reset-every $third"
  echo "augmentation-reset2 $shift --reset-every $third"
  echo "switch-on $off $shift --augmentation-switch-step $third"
  echo "switch-off $shift --augmentation-switch-step $third"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2_pendulum-$SCALE-*" --envs $envs \
  --arms augmentation plain switch-on switch-off primed-augmentation primed-plain-then-augmentation augmentation-reset2 plain-reset2 \
  --tags return fau/critic fau/actor fau/encoder dormant_ratio_tau0.025/critic feature_rank/critic
