#!/usr/bin/env bash
# Gives a TPU back: all its slices and their disks. What is on shared storage stays.
#
#   tpu_scripts/delete.sh --tpu=NAME --zone=ZONE [--project=PROJECT] [--dry_run]
#
# --dry_run  prints what would run, and runs nothing
#
# Needs gcloud, logged in. It does not ask.
set -euo pipefail
# shellcheck disable=SC2034,SC2154,SC1091
{
options=(tpu=NEEDED zone=NEEDED project=)
source "$(dirname "$0")/common.sh"
run gcloud compute tpus queued-resources delete "$tpu" "--zone=$zone" ${project:+"--project=$project"} --force --quiet
}
