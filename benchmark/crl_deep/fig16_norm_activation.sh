#!/usr/bin/env bash
# Fig. 16: no LayerNorm, and ReLU instead of Swish, over depth.
# Expect, at paper scale: both much worse, the more so the deeper. Paper: 3 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

depth_tiers
sweep crl_deep.py fig16 "$envs" "$seeds" $flags < <(
  for depth in $depths; do
    echo "d$depth-full --depth $depth"
    echo "d$depth-nonorm --depth $depth --norm none"
    echo "d$depth-relu --depth $depth --activation relu"
  done
)
draw benchmark/crl_deep/plot.py fig16 --runs "fig16-$SCALE-*"
