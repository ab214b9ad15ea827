#!/usr/bin/env bash
# Asks for a TPU slice, or several that train together, and waits until it is there.
#
#   tpu_scripts/create.sh --tpu=NAME --zone=ZONE --type=TYPE --version=VERSION [--slices=N] [--tier=spot] [--project=PROJECT]
#                         [--dry_run]
#
# Example: tpu_scripts/create.sh --tpu=calrec --zone=us-west4-a --type=v5litepod-16 --version=v2-alpha-tpuv5-lite --tier=spot
#
# --type     accelerator type of one slice          --version  runtime of its hosts (both: gcloud compute tpus … list)
# --slices   slices, joined by the data centre's network (default: 1); they are named NAME-0, NAME-1, …
# --tier     on_demand (default), spot (may be taken away: watch.sh brings it back) or guaranteed (a reservation)
# --dry_run  prints what would run, and runs nothing
#
# Needs gcloud, logged in. Asking again for what is there already is an error of gcloud's; nothing is changed.
set -euo pipefail
# shellcheck disable=SC2034,SC2154,SC1091
{
options=(tpu=NEEDED zone=NEEDED type=NEEDED version=NEEDED slices=1 tier=on_demand project= seconds=30)
source "$(dirname "$0")/common.sh"
case $tier in on_demand) tier= ;; spot|guaranteed) tier=--$tier ;; *) fail "--tier=$tier: on_demand, spot or guaranteed" ;; esac

queued=(gcloud compute tpus queued-resources)
where=("--zone=$zone" ${project:+"--project=$project"})
nodes=("--node-id=$tpu")
[ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$tpu")
run "${queued[@]}" create "$tpu" "${nodes[@]}" "--accelerator-type=$type" "--runtime-version=$version" \
  ${tier:+"$tier"} "${where[@]}"
run "${queued[@]}" describe "$tpu" "${where[@]}" "--format=value(state.state)"
$dry_run && exit 0
while state=$("${queued[@]}" describe "$tpu" "${where[@]}" "--format=value(state.state)"); do
  echo "create.sh: $tpu is $state"
  case $state in
    ACTIVE) exit 0 ;;
    FAILED|SUSPENDED|SUSPENDING) fail "$tpu is $state; delete.sh it, and ask again" ;;
  esac
  sleep "$seconds"
done
}
