#!/bin/bash
# Example job: two nodes of eight GPUs, on storage that they share. Submit it from the top of the checkout:
#     sbatch config/slurm.sh
# Two minutes before the time is up Slurm sends USR1 to this script; the run saves, and the job queues again.
#SBATCH --job-name=nanokv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds to save in before torchrun kills; 30 is its default
out_dir=out/124m-mla
resume=()
[ -e $out_dir/last ] && resume=(--init_from=resume)

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" \
    train.py config/124m/mla.py --out_dir=$out_dir "${resume[@]}" &
step=$!

preempted=
trap 'preempted=1; kill -TERM $step' USR1 TERM  # srun passes it on to torchrun, torchrun to the ranks
wait $step
code=$?
while [ -n "$preempted" ] && kill -0 $step 2>/dev/null; do wait $step; done
[ -n "$preempted" ] && scontrol requeue "$SLURM_JOB_ID" || exit $code
