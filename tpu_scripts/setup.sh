#!/usr/bin/env bash
# Brings this checkout to every host of a TPU, installs it there, and mounts the storage that the hosts share.
#
#   tpu_scripts/setup.sh --tpu=NAME --zone=ZONE [--nfs=HOST:/SHARE] [--slices=N] [--dir=DIR] [--project=PROJECT] [--dry_run]
#
# Example: tpu_scripts/setup.sh --tpu=calrec --zone=us-west4-a --nfs=10.0.0.2:/runs
#
# --nfs      a file share (Filestore, say) that becomes /mnt/runs on each host: run folders of several hosts lie there
# --slices   as in create.sh
# --dir      folder of the checkout on each host, relative to the home there (default: calrec_jax)
# --dry_run  prints what would run, and runs nothing
#
# What git has of HEAD is copied; running it again updates. The hosts' system needs Python 3.11 in its package index
# (Ubuntu 22.04 has it). Needs gcloud, logged in, and git.
set -euo pipefail
# shellcheck disable=SC2034,SC2154,SC1091
{
options=(tpu=NEEDED zone=NEEDED nfs= slices=1 dir=calrec_jax project=)
source "$(dirname "$0")/common.sh"

here=$(cd "$(dirname "$0")/.." && pwd)
archive=calrec_jax.tar.gz
local=$(mktemp -d)
trap 'rm -rf "$local"' EXIT
run git -C "$here" archive --format=tar.gz "--output=$local/$archive" HEAD

folder=$(printf %q "$dir")
install="mkdir -p $folder && tar -xzf $archive -C $folder && sudo apt-get update -qq"
install+=" && sudo apt-get install -yqq make python3.11-venv nfs-common"
install+=" && cd $folder && make .venv/installed PYTHON=python3.11"
install+=" && .venv/bin/pip install -qc constraints.txt -e '.[tpu,gcs]'"
if [ -n "$nfs" ]; then
  # A host must see at once what another has written: that a name was missing is not remembered (nfs(5), lookupcache).
  mount="sudo mount -t nfs -o lookupcache=positive $(printf %q "$nfs") /mnt/runs"
  install+=" && sudo mkdir -p /mnt/runs && (mountpoint -q /mnt/runs || $mount)"
  install+=" && sudo chmod 1777 /mnt/runs"
fi
for slice in $(slice_names); do
  where=("--zone=$zone" ${project:+"--project=$project"} --worker=all)
  run gcloud compute tpus tpu-vm scp "$local/$archive" "$slice:$archive" "${where[@]}"
  run gcloud compute tpus tpu-vm ssh "$slice" "${where[@]}" "--command=$install"
done
}
