#!/usr/bin/env bash
# HiPER beside flat PPO and GRPO on the same format. Resumable: what is done is skipped, also the finished runs that the repository
# holds in results/online/<world>/<arm>/seed<k>/: remove one to run it again.
#   export ALFWORLD_DATA=~/.cache/alfworld
#   recipes/hiper.sh "hiper gae group" "0 1 2"               # ALFWorld, from SFT on a tenth of the train games
#   recipes/hiper.sh "hiper gae group" 0 scienceworld        # the demo panel
#   python recipes/curves.py --folder results/online/alfworld --arms hiper gae group --out results/hiper_alfworld
# shellcheck disable=SC2086
set -euo pipefail
cd "$(dirname "$0")/.."
arms=${1:-"hiper gae group"} seeds=${2:-"0 1 2"} world=${3:-alfworld} flags=${4:-}
out=out/hiper-$world python=.venv/bin/python threads="--threads ${THREADS:-2}"
resume() { if [ -f "$1/config.json" ]; then echo --resume; fi; }
case $world in
  alfworld) gold="--panel tenth --workers 0" epochs=5 play="--panel official" ;;
  scienceworld) gold="--panel demo" epochs=3 play="--panel demo --dev dev --workers 2 --episodes 640 --eval-every 320" ;;
esac

start() {
  [ ! -f $out/sft/policy.json ] || return 0
  $python collect.py --source gold --env $world $gold --out $out/gold.jsonl
  $python train_sft.py --plan-execute --data $out/gold.jsonl --out $out/sft --epochs $epochs --batch-size 64 --lr 3e-3 $threads $(resume $out/sft)
}
for seed in $seeds; do
  for arm in $arms; do
    kept=results/online/$world/$arm/seed$seed
    [ ! -f "$kept/evals.json" ] || { echo "$kept holds this run: skipped; remove it to run it again"; continue; }
    start
    [ -f "$out/$arm/seed$seed/policy.json" ] ||
      $python train_hiper.py --init $out/sft --env $world $play --out "$out/$arm/seed$seed" --rl.advantage "$arm" --seed "$seed" \
        --rl.limit end --rl.lr 3e-4 --rl.batch-size 256 --rl.turns 4096 $flags $threads $(resume "$out/$arm/seed$seed")
    mkdir -p "$kept" && cp "$out/$arm/seed$seed/evals.json" "$kept/"
  done
done
