#!/usr/bin/env bash
# A virtual environment for each peer: benchmarks/peers/setup.sh [trl] [tunix] [hf]
#
# They lie in benchmarks/peers/.venvs, or in $PEERS. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")"
where=${PEERS:-$PWD/.venvs}

# torch comes first, by itself: what follows is then content with it, whichever build pip was told
# to prefer. Only a CPU build is needed.
declare -A needs=(
  [trl]="torch==2.13.0 trl==1.12.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0"
  [tunix]="google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 transformers==5.12.1"
  [hf]="torch==2.13.0 transformers==5.23.0 accelerate==1.15.0"
)

for peer in "${@:-trl tunix hf}"; do
  for name in $peer; do
    if [[ -z ${needs[$name]:-} ]]; then
      echo "no peer ${name}; valid: trl, tunix, hf" >&2
      exit 2
    fi
    "${PYTHON:-python3}" -m venv "$where/$name"
    for part in ${needs[$name]}; do
      [[ $part == torch==* ]] && "$where/$name/bin/pip" install --quiet "$part"
    done
    # shellcheck disable=SC2086
    "$where/$name/bin/pip" install --quiet ${needs[$name]}
    echo "$where/$name: ${needs[$name]}"
  done
done
