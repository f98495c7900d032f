#!/usr/bin/env bash
# Appendix B.7: weight norm and feature rank of encoder, actor and critic with and without augmentation (definitions: ours).
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/drqv2_plasticity/runs.sh

pixel_tiers "walker-stand quadruped-run"
sweep drqv2_plasticity.py drqv2 "$envs" "$seeds" $flags < <(
  echo "augmentation"
  echo "plain --no-augmentation"
)
draw benchmark/drqv2_plasticity/plot.py curves --runs "drqv2-$SCALE-*" --envs $envs --arms augmentation plain \
  --tags return weight_norm/encoder weight_norm/actor weight_norm/critic \
  feature_rank/encoder feature_rank/actor feature_rank/critic dormant_ratio_tau0.025/critic
