#!/usr/bin/env bash
# Offline to online on a task type that nothing has seen before: not the base, not SFT, not offline RL (GLIDER, section 4.4); its family,
# from which imitation learns, may be near to it: who can "find a living thing" has brought animals to a box.
#   recipes/o2o.sh find-animal "0 1 2" "glider awac ac"     # or boil, test-conductivity; then
#   python recipes/curves.py --folder results/online/find-animal --arms glider awac ac --out results/o2o_find-animal
# glider: only the planner learns online, by the returns that followed; glider_q: by Q as GLIDER's eq. 7. oracle: no learning, an expert at one level. replay, nothing: what is frozen instead (train_o2o.py --frozen).
# awac, ac: flat agents, nothing of which is frozen (its one adapter learns), no exploration; awac has the same update, ac is on-policy. The seeds of an arm are those of its online stage: they share one start.
# `heat` is ALFWorld, official games: the offline data lack the verb, the base has read it ($ALFWORLD_DATA).
# Resumable: what is done is skipped. The evaluations of a finished run are kept in results/online/<type>/<arm>/seed<k>/, those made here
# so far are in the repository: remove one to run it again.
# shellcheck disable=SC2086
set -euo pipefail
cd "$(dirname "$0")/.."
type=$1 seeds=${2:-"0 1 2"} arms=${3:-"glider awac ac"} online=${4:---env-steps 10000}
out=out/o2o/$type base=base/held_out python=.venv/bin/python threads="--threads ${THREADS:-2}" train="--threads ${THREADS:-2} --compile" env=""
declare -A epochs=([find-animal]=1.5 [boil]=3 [test-conductivity]=6 [heat]=5)
declare -A rename=([test-conductivity]=1 [boil]=1)  # their families know few substances: other names always, in RL too
declare -A give_up=([boil]=8)  # its expert waits six times
practice="--practice out/o2o/practice.jsonl $out/stumbles.jsonl"
flat_sft="--flat --practice $out/stumbles.jsonl"
[ "$type" != heat ] || { base=base env="--env alfworld --workers 0" practice="" flat_sft="--flat"; }
resume() { if [ -f "$1/config.json" ]; then echo --resume; fi; }
# Why these flags, and why SFT trains all weights (of the planner an adapter learns online): docs/log.md.
declare -A credit=([boil]="--credit.clip-failure")  # its substances are new: who loses 100 points by trying learns not to try
critic="--credit.limit end ${credit[$type]:-} --rl.expectile 0.5 --rl.gamma 0.95 --rl.critic-lr 1e-3"
update="$critic --rl.temperature 0.05 --rl.actor-lr 5e-4 --batch-size 16 --updates 4 --online-share 2"
planner="--temperature 0.5 --planning-ratio 1.4 --explore 0.2 --give-up ${give_up[$type]:-6}" returns="--rl.advantage return"
flat="--frozen nothing --temperature 0.7 $returns"
ac="--rl.actor signed_advantage --offline-share 0 --buffer 16 --updates 2 --batch-size 32 --rl.actor-lr 3e-5 --credit.invalid-penalty 0"  # on-policy: it bears no more

start() { # folder, flags of SFT: to the checkpoint that goes online
  [ ! -f "$out/$1/orl/policy.json" ] || return 0
  [ "$base" = base ] || [ -f "$base/pretrain.json" ] || {  # shipped; remove the folder to make it again
    $python collect.py --source explore --panel without --max-steps 40 --out out/o2o/explore.jsonl
    $python base/pretrain.py --text out/o2o/explore.jsonl --out $base --tokens 16e6 --threads "${THREADS:-2}" \
      --words "${WORDS:-/usr/share/dict/american-english-small}"  # apt install wamerican-small, or any list
  }
  $python collect.py --source gold $env --panel "$type-family" --out "$out/gold.jsonl"
  local extra=${2:-$practice}
  [ "$type" = heat ] || $python collect.py --source stumble --panel "$type-family" --gold "$out/gold.jsonl" --out "$out/stumbles.jsonl"
  [[ $extra != *practice.jsonl* ]] ||
    $python collect.py --source practice --panel without --limit 30 --max-steps 40 --out out/o2o/practice.jsonl
  [ -f "$out/$1/sft/policy.json" ] || $python train_sft.py --model $base --data "$out/gold.jsonl" --out "$out/$1/sft" --rename "${rename[$type]:-0.5}" \
    --epochs "${epochs[$type]}" --rank 0 --lr 1e-3 $train $extra $(resume "$out/$1/sft")
  $python collect.py --source policy $env --panel "$type-family" --limit 15 --checkpoint "$out/$1/sft" --out "$out/$1/rollouts.jsonl" $threads
  $python train_orl.py --init "$out/$1/sft" --expert "$out/gold.jsonl" \
    --rollouts "$out/$1/rollouts.jsonl" --out "$out/$1/orl" --steps 150 --warmup-steps 80 --rename "${rename[$type]:-0}" \
    $critic --rl.temperature 0.2 $train $(resume "$out/$1/orl")
}
online() { # folder to start from, name, seed, flags of train_o2o.py, of SFT
  local kept=results/online/$type/$2/seed$3
  [ ! -f "$kept/evals.json" ] || { echo "$kept holds this run: skipped; remove it to run it again"; return 0; }
  start "$1" "$5"
  [ -f "$out/$2/seed$3/policy.json" ] || $python train_o2o.py --init "$out/$1/orl" --offline "$out/gold.jsonl" "$out/$1/rollouts.jsonl" \
    --out "$out/$2/seed$3" $env --panel "$type" --dev-limit 25 --eval-every 2500 --seed "$3" --rename "${rename[$type]:-0}" $update $online $train $4 $(resume "$out/$2/seed$3")
  mkdir -p "$kept" && cp "$out/$2/seed$3/evals.json" "$kept/"
}
oracle() { # the checkpoint that goes online, with an expert in place of one level: which level is the bottleneck?
  local guide
  for guide in none planner executor; do
    [ -f "results/online/$type/oracle/$guide.json" ] || {
      start planner ""
      $python eval.py --checkpoint "$out/planner/orl" $env --panel "$type" --split dev --limit 25 --guide $guide --name $guide --out "$out/oracle" $threads
      mkdir -p "results/online/$type/oracle" && cp "$out/oracle/results/$guide.json" "results/online/$type/oracle/"
    }
  done
}
for seed in $seeds; do
  for arm in $arms; do
    case $arm in
      oracle) oracle ;;
      glider) online planner glider "$seed" "$planner $returns" "" ;;
      glider_q) online planner glider_q "$seed" "$planner" "" ;;
      replay | nothing) online planner "$arm" "$seed" "$planner $returns --frozen $arm" "" ;;
      awac) online flat awac "$seed" "$flat" "$flat_sft" ;;
      ac) online flat ac "$seed" "$flat $ac" "$flat_sft" ;;
    esac
  done
done
