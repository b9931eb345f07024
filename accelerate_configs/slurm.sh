#!/bin/bash
# Several nodes under Slurm: one `accelerate launch` a node, which starts one process a GPU.
#   sbatch --nodes 4 accelerate_configs/slurm.sh accelerate_configs/zero3.yaml recipes/pretrain/run.py --config my.yaml
# Submit from the repository, with the environment of requirements.txt active. The repository, output_dir and HF_HOME lie
# on a file system that all nodes share. Copy this file for what your cluster wants besides: account, partition, modules.

#SBATCH --job-name=llm-recipes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# A lost node puts the job back into the queue; its next start goes on from the last whole checkpoint (resume: auto).
#SBATCH --requeue
#SBATCH --open-mode=append
# A warning five minutes before the time limit, to this script alone (B:): the launchers do not know USR1 and would die of it.
#SBATCH --signal=B:USR1@300

set -euo pipefail
config=$1
shift

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share the first node

# A launcher kills its processes this many seconds after SIGTERM, by default 30; saving a checkpoint may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

# SIGTERM makes every process save and leave. scancel hands it to the launchers; srun would kill its tasks if it got it.
warned=
trap 'warned=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# --cpus-per-task: srun does not take it over from sbatch.
# --kill-on-bad-exit: when one node fails, the others would wait for it in a collective, for half an hour by default.
# The node's number is known on the node only, hence bash; exec, so that signals reach the launcher.
# shellcheck disable=SC2016
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' bash \
    --config_file "$config" --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
    --main_process_ip "${hosts[0]}" --main_process_port "$port" --deepspeed_multinode_launcher standard "$@" &

wait $! && code=0 || code=$?
if [[ $warned ]]; then
    wait $! && code=0 || code=$? # the warning ended the first wait, not srun
fi

# The recipes leave with 75 when they have saved and can go on, but accelerate makes 1 of every failure. So: stopped by our
# own warning and not finished means to be continued. Any other failure would only repeat itself.
if [[ $warned && $code != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
