#!/usr/bin/env bash
# The main table: ScienceWorld's glider panel and ALFWorld's official games, 3 seeds each -> results/main.json. Resumable: what is done is skipped.
#   export ALFWORLD_DATA=~/.cache/alfworld; recipes/main.sh ["0 1 2"]
# On two cores seeds side by side, one thread each, are faster: run the two recipes below by hand for one seed each (THREADS=1), then this.
# shellcheck disable=SC2086
set -euo pipefail
cd "$(dirname "$0")/.."
seeds=${1:-"0 1 2"} python=.venv/bin/python
recipes/scienceworld.sh glider "$seeds"
recipes/alfworld.sh "$seeds"
PANEL=tenth recipes/alfworld.sh "$seeds" "--epochs 8 --shares 1 2 2"
for seed in $seeds; do  # once, whatever dev says: the last stage
  run=out/glider/seed$seed
  play="$python eval.py --checkpoint $run/orl --out $run --seed $seed --threads ${THREADS:-2}"
  [ -f "$run/results/test.json" ] || $play --panel glider --split test --name test --reason "seed $seed of offline RL"
  [ -f "$run/results/full.json" ] || $play --panel full --name full
  [ -f "$run/results/full100.json" ] || $play --panel full --max-steps 100 --name full100
done
$python recipes/main.py
