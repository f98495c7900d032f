#!/usr/bin/env bash
# Main-text Fig. 12, how far depth goes: up to 1024 layers (there the actor stays at 512: at 1024 its loss explodes).
# Expect, at paper scale (150M steps): Humanoid U-Maze about 3 (depth 4), 33 (64), 62 (256), 85-110 (1024).
# The paper's second panel, humanoid_big_maze, runs for 100M steps: about 0.1 (4), 6.2 (256), 4.8 (512).
source "$(dirname "$(realpath "$0")")/../common.sh"
source benchmark/crl_deep/runs.sh

case $SCALE in
  smoke) seeds=1 envs=point_room depths="4 32" limit=16 flags=$SMOKE ;;
  small) seeds=1 envs=humanoid_u_maze depths="4 64 256" limit=512 flags="--total-timesteps 5000000 --eval-every 50000" ;;
  paper) seeds="1 2 3" envs="humanoid_u_maze humanoid_big_maze" depths="4 64 256 512 1024" limit=512 flags="" ;;
esac
for env in $envs; do
  steps=$flags
  case $SCALE-$env in
    paper-humanoid_u_maze) steps="--total-timesteps 150000000 --eval-every 1500000" ;;
    paper-humanoid_big_maze) steps="--total-timesteps 100000000 --eval-every 1000000" ;;
  esac
  sweep crl_deep.py fig12 "$env" "$seeds" $steps < <(
    for depth in $depths; do
      echo "d$depth --actor-depth $((depth < limit ? depth : limit)) --critic-depth $depth"
    done
  )
done
draw benchmark/crl_deep/plot.py fig12 --runs "fig12-$SCALE-*"
