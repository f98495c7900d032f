#!/usr/bin/env bash
# Fig. 2 and Appendix B.3: augmentation against other interventions, those without augmentation; Cheetah Run.
# Expect, at paper scale: augmentation 891 (the star: 880, as read from Fig. 6), layer norm 655, CReLU 429,
# shrink-and-perturb 312, L2-Init 301, spectral norm 254, weight decay 241, none about 270. What the paper leaves open is our
# choice, see the help of the flags; the bars show the critic's metrics, the paper does not say whose its are.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "cheetah-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
  echo "layer-norm --no-augmentation --layer-norm"
  echo "crelu --no-augmentation --crelu"
  echo "shrink-perturb --no-augmentation --shrink-perturb-every $((third / 5))"
  echo "l2-init --no-augmentation --l2-init 1e-2"
  echo "spectral-norm --no-augmentation --spectral-norm head"
  echo "spectral-norm-trunk --no-augmentation --spectral-norm trunk"
  echo "weight-decay --no-augmentation --weight-decay 1e-5"
)
draw benchmark/drqv2_plasticity/plot.py bars --runs "drqv2-$SCALE-*" --envs $envs \
  --arms augmentation plain layer-norm crelu shrink-perturb l2-init spectral-norm spectral-norm-trunk weight-decay \
  --tags return feature_rank/critic weight_norm/critic fau/critic
