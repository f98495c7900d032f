#!/usr/bin/env bash
# Installs everything into .venv, trains crl_deep.py on its default (a point mass in a room) and draws what it learned.
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"
exp="quickstart-$(date +%s)"
python crl_deep.py --exp-name "$exp" --save-model "$@"
python benchmark/crl_deep/plot.py quickstart --runs "$exp" --out runs/figures/quickstart
echo "look at runs/figures/quickstart.png"
