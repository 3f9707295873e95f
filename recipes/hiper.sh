#!/usr/bin/env bash
# HiPER beside flat PPO and GRPO on ALFWorld, from SFT on a tenth of the train games. Resumable: what is done is skipped.
#   export ALFWORLD_DATA=~/.cache/alfworld
#   recipes/hiper.sh "hiper gae group" "0 1 2"; then: python recipes/curves.py --folder results/online/alfworld --arms hiper gae group --out results/hiper
# shellcheck disable=SC2086
set -euo pipefail
cd "$(dirname "$0")/.."
arms=${1:-"hiper gae group"} seeds=${2:-"0 1 2"} flags=${3:---rl.limit end --rl.lr 3e-4 --rl.batch-size 256 --rl.turns 4096}
out=out/hiper python=.venv/bin/python threads="--threads ${THREADS:-2}"
resume() { if [ -f "$1/config.json" ]; then echo --resume; fi; }

$python collect.py --source gold --env alfworld --panel tenth --workers 0 --out $out/gold.jsonl
[ -f $out/sft/policy.json ] ||
  $python train_sft.py --plan-execute --data $out/gold.jsonl --out $out/sft --epochs 5 $threads $(resume $out/sft)
for seed in $seeds; do
  for arm in $arms; do
    kept=results/online/alfworld/$arm/seed$seed
    [ ! -f "$kept/evals.json" ] || continue
    [ -f "$out/$arm/seed$seed/policy.json" ] ||
      $python train_hiper.py --init $out/sft --panel official --out "$out/$arm/seed$seed" --rl.advantage "$arm" --seed "$seed" \
        $flags $threads $(resume "$out/$arm/seed$seed")
    mkdir -p "$kept" && cp "$out/$arm/seed$seed/evals.json" "$kept/"
  done
done
