#!/usr/bin/env bash
# Fig. 4: augmentation on and off behind a frozen encoder, half a ResNet-18 trained on ImageNet (the weights are downloaded;
# without a network: EXTRA="--encoder-weights PATH"). The smoke runs have random weights and a tiny layer behind them.
# Expect (paper): augmentation wins clearly although the encoder has no plasticity to lose. Walker Walk is named in an article
# of the authors, the other two tasks are our guess; so are the million frames of all three.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "walker-walk walker-run cheetah-run"
[ "$SCALE" != paper ] || flags="--total-timesteps 500000"
[ "$SCALE" != smoke ] || flags="$DRQ_SMOKE --total-timesteps 600 --eval-every 600 --encoder-weights random --projection-dim 32"
sweep studies/drqv2_frozen_encoder.py frozen "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "frozen-$SCALE-*" --envs $envs --arms augmentation plain \
  --tags return fau/actor fau/critic
