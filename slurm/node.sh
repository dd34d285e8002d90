#!/bin/bash
# One node of the Ray cluster of a job: `srun bash node.sh FOLDER IP PLACES LOGS COMMAND...` runs it on every node.
# The first one is Ray's head and runs COMMAND, each has PLACES for workers. What the head writes into the pipe
# FOLDER/line, srun hands to all of them as stdin: Ray's address with the job's token, and at the end an empty line.
set -uo pipefail
trap '' USR1 # Slurm's notice is for COMMAND alone: Ray must live until the workers have saved
folder=$1 ip=$2 places=$3 log=$4/ray-$SLURM_JOB_ID-$SLURM_NODEID.log ray='' over=''
shift 4

# Whoever reaches Ray's ports could run code as this user: only a token of 256 bits, made for this job, opens them.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_USAGE_STATS_ENABLED=0
# Ray would wait at the end, count the memory of other jobs on this node as this one's, and run its workers at nice 15.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 RAY_memory_monitor_refresh_ms=0 RAY_worker_niceness=0 \
    RAY_gcs_server_port_wait_time_s=120

keep_token() { (umask 077 && printf %s "$1" > "$RAY_AUTH_TOKEN_PATH"); }
# Every port is one that the system gives, so that jobs may share a node.
node() {
    exec ray start --block --num-cpus="$places" --object-store-memory=100000000 --min-worker-port=0 \
        --max-worker-port=0 --dashboard-agent-listen-port=0 "$@" 2>&1
}

if [ "$SLURM_PROCID" = 0 ]; then
    trap : TERM # scancel: Ray's end follows
    keep_token "$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
    coproc RAY { node --head --port=0 --node-ip-address="$ip" --temp-dir="$folder/ray" --include-dashboard=false; }
    ray=$RAY_PID line=''
    exec 4<&"${RAY[0]}"
    until [[ $line == *"--address='"* ]]; do # once Ray is up, it says where
        IFS= read -r line <&4 || { echo "tldist: Ray did not start, see $log" >&2; exit 1; }
        printf '%s\n' "$line" >> "$log"
    done
    cat <&4 >> "$log" &
    address=${line#*--address=\'} address=${address%%\'*}
    echo "$address $(<"$RAY_AUTH_TOKEN_PATH")" > "$folder/line"
    RAY_ADDRESS=$address "$@" < /dev/null & command=$!
    wait -n "$command" "$ray"
    said=$?
    # Ray is gone before COMMAND, or is going (scancel reaches all processes at once): nothing more can be saved.
    { kill -KILL "$command" && said=1; wait "$command"; } 2> /dev/null
    echo "$said" > "$folder/code" # this script's own code would end the other nodes at once
    echo > "$folder/line"
else
    read -r address token || exit 0
    mkdir -m 700 "$folder" 2> /dev/null && trap 'rm -rf "$folder"' EXIT
    [ -O "$folder" ] || { echo "tldist: $folder on $SLURMD_NODENAME is somebody else's" >&2; exit 1; }
    keep_token "$token"
    trap 'over=yes; kill "$ray" 2> /dev/null' TERM # scancel, or the reader of the second line
    { read -r _; kill $$; } <&0 &
    for _ in 1 2 3; do # Ray gives up on a node that takes 30 s to start
        [ -n "$over" ] || { node --address="$address" >> "$log" & ray=$!; }
        [ -n "$over" ] || wait "$ray"
    done
    [ -n "$over" ] || { echo "tldist: Ray ended on $SLURMD_NODENAME, see $log" >&2; code=1; } # srun ends the others
    kill %1 2> /dev/null
fi
kill "$ray" 2> /dev/null
wait "$ray"
exit "${code:-0}"
