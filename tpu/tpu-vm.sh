#!/usr/bin/env bash
# TPU VMs by queued resources: tpu-vm.sh up | status | logs | stop | delete. It costs money from
# ACTIVE until delete. `up` again resumes, on new machines if spot ones were taken back.
set -euo pipefail
# @values@
# NAME, ZONE, PROJECT (or empty), TYPE, SLICES, RUNTIME, SPOT (or empty), UNTIL; BUNDLE: a folder
# named NAME with host.sh and what belongs to it.

queued() { # verb, arguments
  local verb=$1
  shift
  gcloud compute tpus queued-resources "$verb" "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

state() { queued describe "$NAME" '--format=value(state.state)' 2>/dev/null || true; }

on_all() { queued ssh "$NAME" --node=all --worker=all "--command=$1"; }

host() { on_all "bash rlhf-jax/$NAME/host.sh $1"; }

create() {
  local flags=("--accelerator-type=$TYPE" "--runtime-version=$RUNTIME")
  if ((SLICES > 1)); then
    flags+=("--node-count=$SLICES" "--node-prefix=$NAME")
  else
    flags+=("--node-id=$NAME")
  fi
  if [[ -n $SPOT ]]; then flags+=(--spot); fi
  if [[ -n $UNTIL ]]; then flags+=("--valid-until-duration=$UNTIL"); fi
  queued create "$NAME" "${flags[@]}"
}

delete() { queued delete "$NAME" --force --quiet; }

up() {
  local now before="" lost=0
  now=$(state)
  while [[ $now != ACTIVE ]]; do
    [[ $now == "$before" ]] || echo "$NAME: ${now:-not there}"
    before=$now
    case $now in
      "") # not created yet, or gone, or no answer
        if ((lost++ == 0)); then create; elif ((lost > 10)); then
          echo "$NAME: gcloud does not show it" >&2
          exit 1
        fi
        ;;
      SUSPENDED) delete && create ;; # a spot machine does not come back
      FAILED)
        echo "$NAME: the request failed: gcloud compute tpus queued-resources describe" >&2
        exit 1
        ;;
    esac
    sleep "${POLL:-30}"
    now=$(state)
  done
  on_all "mkdir -p rlhf-jax"
  queued scp --recurse --node=all --worker=all "$BUNDLE" "$NAME:rlhf-jax/"
  host install
  host start
  logs
}

logs() { queued ssh "$NAME" --node=0 --worker=0 "--command=bash rlhf-jax/$NAME/host.sh log"; }

case ${1-} in
  up | logs | delete) "$1" ;;
  status) queued describe "$NAME" ;;
  stop) host stop ;;
  *) echo "usage: tpu-vm.sh up | status | logs | stop | delete" >&2 && exit 2 ;;
esac
