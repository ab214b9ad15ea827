#!/usr/bin/env bash
# Runs the same command on every host of a TPU VM.
#
#   tpu_scripts/launch.sh --tpu=NAME --zone=ZONE [--project=PROJECT] [--dir=DIR] [--env=NAME=VALUE]… [--dry_run] -- COMMAND…
#
# Example, the installation: tpu_scripts/launch.sh --tpu=v5e-16 --zone=us-west4-a -- make .venv/installed
# and a run on a TPU VM of one host: … -- .venv/bin/calrec run --gin_file=runs/scientific_reproduction.gin --run_dir=runs/sci
#
# --dir      folder of the checkout on each host, relative to the home there (default: calrec_jax)
# --env      set on each host; repeatable
# --dry_run  prints what would run, and runs nothing
#
# Needs gcloud, logged in. Every host gets the very same command.
#
# Training on all hosts of a slice (the run folder on storage that they share):
#   … -- .venv/bin/calrec train --gin_file=runs/scientific_reproduction.gin --run_dir=/mnt/runs/sci --multihost
# The other verbs run on one host.
set -euo pipefail

fail() { echo "launch.sh: error: $1" >&2; exit 1; }

tpu= zone= project= dir=calrec_jax dry_run=false
environment=()
while [ $# -gt 0 ]; do
  case $1 in
    --tpu=*) tpu=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --dir=*) dir=${1#*=} ;;
    --env=[A-Za-z_]*=*) environment+=("${1#--env=}") ;;
    --dry_run) dry_run=true ;;
    --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; --help shows the usage" ;;
  esac
  shift
done
[ -n "$tpu" ] || fail "--tpu=NAME is missing"
[ -n "$zone" ] || fail "--zone=ZONE is missing"
[ $# -gt 0 ] || fail "no command: write it after --"

# Quoted twice: by printf for the shell of the hosts, and again by "$@" for this one.
remote="cd $(printf %q "$dir") &&"
for setting in ${environment[@]+"${environment[@]}"}; do
  remote+=" ${setting%%=*}=$(printf %q "${setting#*=}")"
done
remote+="$(printf ' %q' "$@")"

gcloud=(gcloud compute tpus tpu-vm ssh "$tpu" "--zone=$zone" ${project:+"--project=$project"} --worker=all "--command=$remote")
if $dry_run; then
  printf '%q ' "${gcloud[@]}"
  echo
else
  exec "${gcloud[@]}"
fi
