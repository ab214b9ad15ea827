#!/usr/bin/env bash
# Runs the same command on every host of a TPU, of all its slices at once.
#
#   tpu_scripts/launch.sh --tpu=NAME --zone=ZONE [--project=PROJECT] [--slices=N] [--worker=W] [--dir=DIR] [--env=NAME=VALUE]…
#                         [--dry_run] -- COMMAND…
#
# Example, the whole line on all hosts (the run folder on storage that they share):
#   tpu_scripts/launch.sh --tpu=calrec --zone=us-west4-a -- \
#     .venv/bin/calrec run --gin_file=runs/scientific_reproduction.gin --run_dir=/mnt/runs/sci --multihost
#
# --slices   as in create.sh (default: 1)
# --worker   one host alone, by its number from 0 (default: all); a verb that runs on one host wants, beside --worker=0,
#            --env=JAX_PLATFORMS=cpu: the TPU of a slice answers when all of its hosts ask
# --dir      folder of the checkout on each host, relative to the home there (default: calrec_jax)
# --env      set on each host; repeatable
# --dry_run  prints what would run, and runs nothing
#
# Needs gcloud, logged in. It ends when all hosts have, and fails when one does.
set -euo pipefail
# shellcheck disable=SC2034,SC2154,SC1091
{
environment=() kept=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in --env=[A-Za-z_]*=*) environment+=("${1#--env=}") ;; *) kept+=("$1") ;; esac
  shift
done
set -- ${kept[@]+"${kept[@]}"} "$@"
options=(tpu=NEEDED zone=NEEDED project= slices=1 worker=all dir=calrec_jax)
source "$(dirname "$0")/common.sh"
[ ${#rest[@]} -gt 0 ] || fail "no command: write it after --"

# Quoted twice: by printf for the shell of the hosts, and again by "$@" for this one.
remote="cd $(printf %q "$dir") &&"
for setting in ${environment[@]+"${environment[@]}"}; do
  remote+=" ${setting%%=*}=$(printf %q "${setting#*=}")"
done
remote+="$(printf ' %q' "${rest[@]}")"

running=()
for slice in $(slice_names); do
  run gcloud compute tpus tpu-vm ssh "$slice" "--zone=$zone" ${project:+"--project=$project"} "--worker=$worker" \
    "--command=$remote" &
  running+=($!)
  $dry_run && wait $!
done
status=0
for each in "${running[@]}"; do wait "$each" || status=$?; done
exit $status
}
