#!/usr/bin/env bash
# Fig. 5: depth with and without the residual connections.
# Expect, at paper scale: without them performance falls with depth. Paper: 3 seeds.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

depth_tiers
sweep crl_deep.py fig5 "$envs" "$seeds" $flags < <(
  for depth in $depths; do
    echo "d$depth-residual --depth $depth"
    echo "d$depth-plain --depth $depth --no-residual"
  done
)
draw benchmark/crl_deep/plot.py fig5 --runs "fig5-$SCALE-*"
