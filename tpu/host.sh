#!/usr/bin/env bash
# What every host of a launch runs: install, look around, train; again, it goes on where it was.
#   host.sh install | run | start (run, detached) | log | stop
set -euo pipefail
# @values@
# NAME; EXPERIMENT, SETTINGS, OUT: what to train; INSTALL: what uv installs, empty if it is there;
# SOURCE, REVISION: a git repository to work in, or empty; BEFORE: a command to run first, or empty;
# WORK: a folder of this host, or empty.
work=${WORK:-$(cd "$(dirname "$0")" && pwd)}
export PATH="$work/venv/bin:$HOME/.local/bin:$PATH"

install() {
  mkdir -p "$work"
  cd "$work"
  if [[ -n $BEFORE ]]; then bash -c "$BEFORE"; fi
  if [[ -n $SOURCE ]]; then
    [[ -d source ]] || git clone --quiet -- "$SOURCE" source
    git -C source fetch --quiet --tags origin
    git -C source checkout --quiet --detach "$REVISION"
  fi
  [[ -n $INSTALL ]] || return 0
  command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  [[ -d venv ]] || uv venv --quiet --python '>=3.11' venv
  uv pip install --quiet --reinstall-package rlhf-jax --python venv/bin/python "$INSTALL"
}

run() {
  # What was fetched or copied is where experiments are; else it is where this was started.
  for place in source files; do
    if [[ -d $work/$place ]]; then cd "$work/$place"; fi
  done
  rlhf-jax doctor "$EXPERIMENT" "${SETTINGS[@]}" --checkpoints "$OUT"
  # 75: stopped by a signal with everything saved, so that whoever watches starts it again.
  exec rlhf-jax train "$EXPERIMENT" --out "$OUT" "${SETTINGS[@]}" --resume --stopped-status 75
}

running() { [[ -f $work/pid ]] && kill -0 "$(cat "$work/pid")" 2>/dev/null; }

start() { # outlives the connection that started it
  if running; then
    echo "$NAME is running already"
    return
  fi
  setsid nohup bash "$0" run >>"$work/log" 2>&1 </dev/null &
  echo "$!" >"$work/pid"
}

stop() { if running; then kill -TERM "$(cat "$work/pid")"; fi; }

log() { tail -n 50 -F "$work/log"; }

for action in "$@"; do
  case $action in
    install | run | start | stop | log) "$action" ;;
    *) echo "host.sh: no action $action" >&2 && exit 2 ;;
  esac
done
