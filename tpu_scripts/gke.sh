#!/usr/bin/env bash
# The same on Google Kubernetes Engine, by xpk: a cluster with TPU slices, calrec as a workload that is restarted.
#
#   tpu_scripts/gke.sh --do=create|launch|watch|stop|delete --cluster=NAME --zone=ZONE --project=PROJECT --type=TYPE
#                      [--slices=N] [--spot=true] [--workload=NAME] [--image=IMAGE] [--restarts=50] [--dry_run] [-- COMMAND…]
#
# Example: tpu_scripts/gke.sh --do=create --cluster=calrec --zone=us-west4-a --project=P --type=v5litepod-16
#          tpu_scripts/gke.sh --do=launch --cluster=calrec --zone=us-west4-a --project=P --type=v5litepod-16 --workload=sci -- \
#            calrec run --gin_file=runs/scientific_reproduction.gin --run_dir=/mnt/runs/sci --multihost
#
# launch  puts this checkout into --image (default: python:3.12), installs it in each container and runs the command; a
#         container that fails, or whose machine is taken away, starts it again, up to --restarts times
# watch   waits until the workload has ended     stop  ends it     delete  gives the cluster back
# The storage at /mnt/runs is one that `xpk storage attach` gave the cluster; --dry_run prints, and runs nothing.
# Needs xpk, gcloud, kubectl and docker. Run it from the root of the checkout.
set -euo pipefail
# shellcheck disable=SC2034,SC2154,SC1091
{
options=(do=NEEDED cluster=NEEDED zone=NEEDED project=NEEDED type=v5litepod-16 slices=1 spot=false workload=calrec
  image=python:3.12 restarts=50)
source "$(dirname "$0")/common.sh"

where=("--cluster=$cluster" "--zone=$zone" "--project=$project")
tier=--on-demand
[ "$spot" = false ] || tier=--spot
case ${do} in
  create) run xpk cluster create "${where[@]}" "--tpu-type=$type" "--num-slices=$slices" "$tier" ;;
  launch)
    [ ${#rest[@]} -gt 0 ] || fail "no command: write it after --"
    command="pip install -qc constraints.txt '.[tpu,gcs]' &&$(printf ' %q' "${rest[@]}")"
    run xpk workload create "${where[@]}" "--workload=$workload" "--tpu-type=$type" "--num-slices=$slices" \
      "--base-docker-image=$image" "--script-dir=." "--max-restarts=$restarts" "--command=$command" ;;
  watch) run xpk workload list "${where[@]}" "--wait-for-job-completion=$workload" ;;
  stop) run xpk workload delete "${where[@]}" "--workload=$workload" ;;
  delete) run xpk cluster delete "${where[@]}" ;;
  *) fail "--do=${do}: create, launch, watch, stop or delete" ;;
esac
}
