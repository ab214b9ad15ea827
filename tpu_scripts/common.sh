# shellcheck shell=bash disable=SC2154
# What the scripts of this folder share; it is sourced, not run. A script sets `options` (names of --NAME=VALUE, with a
# default after "=") before it sources this; each becomes a variable of that name. All know --dry_run and --help.
set -euo pipefail

script=$(basename "$0")
fail() { echo "$script: error: $1" >&2; exit 1; }

# Prints a command when --dry_run is on, else runs it.
run() {
  if $dry_run; then printf '%q ' "$@"; echo; else "$@"; fi
}

# The names of the slices of a queued resource: its own, or with several NAME-0, NAME-1, …
slice_names() {
  if [ "$slices" = 1 ]; then echo "$tpu"; else seq -f "$tpu-%g" 0 $((slices - 1)); fi
}

dry_run=false
rest=()
for option in "${options[@]}"; do printf -v "${option%%=*}" %s "${option#*=}"; done
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=true ;;
    --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; rest=("$@"); break ;;
    --*=*)
      name=${1%%=*} name=${name#--}
      case " ${options[*]%%=*} " in *" $name "*) ;; *) fail "unknown argument $1; --help shows the usage" ;; esac
      printf -v "$name" %s "${1#*=}" ;;
    *) fail "unknown argument $1; --help shows the usage" ;;
  esac
  shift
done
for option in "${options[@]}"; do
  name=${option%%=*}
  [ "$option" != "$name=NEEDED" ] || [ "${!name}" != NEEDED ] || fail "--$name=… is missing; --help shows the usage"
done
