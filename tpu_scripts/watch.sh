#!/usr/bin/env bash
# Runs a command on every host of a TPU until it succeeds: again when it fails, and on a new slice when the TPU is taken away.
#
#   tpu_scripts/watch.sh --tpu=NAME --zone=ZONE --type=TYPE --version=VERSION [--slices=N] [--tier=spot] [--nfs=HOST:/SHARE]
#                        [--tries=50] [--project=PROJECT] [--dry_run] -- COMMAND…
#
# Example: tpu_scripts/watch.sh --tpu=calrec --zone=us-west4-a --type=v5litepod-16 --version=v2-alpha-tpuv5-lite --tier=spot \
#   --nfs=10.0.0.2:/runs -- .venv/bin/calrec run --gin_file=runs/scientific_reproduction.gin --run_dir=/mnt/runs/sci --multihost
#
# Every argument before -- but --tries is one of create.sh, setup.sh or launch.sh. calrec goes on where its last checkpoint
# is, so the same command is run each time. A stage that was asked to stop (SIGTERM, a maintenance event) exits with 0 after
# it is saved: where the report (of `calrec train`: the stage's manifest) is not there yet, start this again.
# --tries    how often the command is started before this gives up
# --dry_run  prints what would run, and runs nothing
set -euo pipefail
# shellcheck disable=SC2034,SC2154,SC1091
{
options=(tpu=NEEDED zone=NEEDED type=NEEDED version=NEEDED slices=1 tier=on_demand nfs= tries=50 project= seconds=30)
source "$(dirname "$0")/common.sh"
[ ${#rest[@]} -gt 0 ] || fail "no command: write it after --"

folder=$(dirname "$0")
which=("--tpu=$tpu" "--zone=$zone" ${project:+"--project=$project"})
both=("${which[@]}" "--slices=$slices")
create=("$folder/create.sh" "${both[@]}" "--type=$type" "--version=$version" "--tier=$tier" "--seconds=$seconds")
describe=(gcloud compute tpus queued-resources describe "$tpu" "--zone=$zone" ${project:+"--project=$project"})
describe+=("--format=value(state.state)")
if $dry_run; then
  run "${describe[@]}"
  for step in "$folder/delete.sh ${which[*]}" "${create[*]}" "$folder/setup.sh ${both[*]} --nfs=$nfs"; do
    # shellcheck disable=SC2086
    bash $step --dry_run
  done
  bash "$folder/launch.sh" "${both[@]}" --dry_run -- "${rest[@]}"
  exit 0
fi
for ((try = 1; try <= tries; try++)); do
  state=$("${describe[@]}" 2>/dev/null || echo MISSING)
  if [ "$state" != ACTIVE ]; then
    echo "watch.sh: $tpu is $state"
    [ "$state" = MISSING ] || bash "$folder/delete.sh" "${which[@]}" || true
    if ! { bash "${create[@]}" && bash "$folder/setup.sh" "${both[@]}" "--nfs=$nfs"; }; then sleep "$seconds"; continue; fi
  fi
  echo "watch.sh: try $try of $tries"
  bash "$folder/launch.sh" "${both[@]}" -- "${rest[@]}" && exit 0
  sleep "$seconds"
done
fail "the command did not succeed in $tries tries"
}
