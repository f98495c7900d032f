#!/usr/bin/env bash
# Fig. 10: the critic's fraction of active units and the replay ratio, Quadruped Run (the runs of Fig. 9). Expect, at paper
# scale, at 0.3 / 1 / 3M frames: 0.5 .415 / .453 / .382; 2 .338 / .300 / .221; adaptive .398 / .430 / .291. The paper's
# five seeds switched at 0.55 to 1.2M frames.
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/adaptive_rr/runs.sh

ratio_tiers "quadruped-run"
sweep adaptive_rr.py rr "$envs" "$seeds" $flags < <(
  echo "static0.5 --rr-high 0.5"
  echo "static2 --rr-low 2"
  echo "adaptive"
)
draw benchmark/adaptive_rr/plot.py curves --runs "rr-$SCALE-*" --envs $envs --arms static0.5 static2 adaptive \
  --tags fau/critic fau/actor fau/encoder charts/replay_ratio
