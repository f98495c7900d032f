#!/usr/bin/env bash
# Fig. 9: return of Adaptive RR and of replay ratio 0.5 and 2 throughout, on six tasks (those of Fig. 20: our guess).
# Expect, at paper scale, at 2M frames (Table 1), 0.5 / 2 / adaptive: Cheetah 828 / 793 / 880, Walker 710 / 709 / 758,
# Quadruped Run 579 / 417 / 784.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/adaptive_rr/runs.sh

ratio_tiers "quadruped-run cheetah-run walker-run quadruped-walk hopper-hop reacher-hard"
sweep adaptive_rr.py rr "$envs" "$seeds" $flags < <(
  echo "static0.5 --rr-high 0.5"
  echo "static2 --rr-low 2"
  echo "adaptive"
)
draw benchmark/adaptive_rr/plot.py curves --runs "rr-$SCALE-*" --envs $envs --arms static0.5 static2 adaptive
