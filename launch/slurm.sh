#!/bin/bash
# One recipe on several hosts under Slurm:  sbatch launch/slurm.sh recipes/hmoe.yaml runs/hmoe [key=value ...]
# The run folder must be on a disk that all hosts share. A lost process or host: the others meet again and go on from the
# last checkpoint. A lost first host, or the end of the time limit: the job is queued again and continues.
#SBATCH --job-name=moestro
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
# two minutes before the limit every rank is asked to save and stop
#SBATCH --signal=TERM@120
set -uo pipefail

recipe=${1:?a recipe}
out=${2:?a run folder}
shift 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# torchrun, whose connections do not wait for a host that is cut off
srun --kill-on-bad-exit=0 python -m moestro.parallel.agent \
    --nnodes="1:$SLURM_JOB_NUM_NODES" \
    --nproc-per-node=8 \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint="$head:29500" \
    --max-restarts=10 \
    -m moestro train "$recipe" --out "$out" "$@"

# done.json is what a finished run leaves; ten tries, so that a mistake does not come back for ever
if [ ! -e "$out/done.json" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
