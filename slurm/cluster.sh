#!/bin/bash
# shellcheck disable=SC2034,SC2154 # the script that sources it sets the others, and reads `status`
# Sourced by batch scripts: `on_cluster COMMAND...` runs COMMAND with a Ray cluster over the job's nodes, each with
# `places` for workers, and leaves its exit code in `status`; node.sh has the rest. Ray's own output goes to `logs`.

on_cluster() {
    local folder node ip cancelled=''
    # Ray's files go to each node's own disk; its sockets need a short path.
    folder=$(mktemp -d "${RAY_TMPDIR:-/tmp}/ray-XXXXXX")
    # shellcheck disable=SC2064 # the folder as it is called now
    trap "rm -rf '$folder'" EXIT
    mkfifo "$folder/line"
    exec 3<> "$folder/line"
    node=$(scontrol show node "$SLURMD_NODENAME" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    ip=$(getent ahostsv4 "$node" | awk '$1 !~ /^127\./ {print $1; exit}')
    [ -z "$bin" ] || export PATH="$bin:$PATH"
    trap 'cancelled=143' TERM # scancel: Slurm tells the step too, and its end is waited for
    # srun does not take over --cpus-per-task by itself since Slurm 22.05; what it reads from stdin, every task reads.
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
        --kill-on-bad-exit=1 --mpi=none "${container[@]}" \
        env PYTHONPATH="$code" bash "$scripts/node.sh" "$folder" "${ip:-127.0.0.1}" "$places" "$logs" "$@" <&3 &
    while kill -0 $! 2> /dev/null; do wait $!; done # a signal's trap interrupts it
    wait $!
    status=$?
    [ ! -e "$folder/code" ] || status=$(<"$folder/code") # of COMMAND; without it, why srun ended
    status=${cancelled:-$status}
}
