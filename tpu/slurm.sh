#!/usr/bin/env bash
# One process per node. Two minutes before its time is over, or when it is preempted, the run saves,
# and the job goes back into the queue; there it goes on from the last checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
set -uo pipefail
# @values@
# LAUNCH: the folder of host.sh, seen by all nodes; RESTARTS: how often at most.

again=1 interrupted=
# shellcheck disable=SC2329 # the traps call it
save() { # what USR1 means: the time is nearly over
  interrupted=1
  scancel --signal=TERM "$SLURM_JOB_ID" # the steps alone, not this script
}
trap save USR1
trap 'again= && save' USR2 TERM # stop; one that was preempted, SLURM puts back by itself

bash "$LAUNCH/host.sh" install || exit 1
srun --kill-on-bad-exit=1 bash "$LAUNCH/host.sh" run &
step=$!
while :; do
  interrupted=
  wait "$step"
  status=$?
  [[ -n $interrupted ]] || break
done
# 75: saved; 143: stopped before it had begun to train.
if ((status == 75 || status == 143)) && [[ -n $again ]] && ((${SLURM_RESTART_COUNT:-0} < RESTARTS)); then
  echo "stopped: back into the queue"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # which ends this script
fi
exit "$status"
