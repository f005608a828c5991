#!/usr/bin/env bash
# jaxpeft in several processes on this machine, each with a GPU where there are some:
#
#     experiments/launch/local.sh 4 train --model path/to/llama --data rows.jsonl --mesh fsdp=4 --out run
#
# PYTHON is the interpreter (default: python3), PORT one that is free (default: any).
# One process sees all GPUs of a machine, too, and needs no launcher: this is to try what a cluster does.
set -euo pipefail

count=${1:?usage: local.sh PROCESSES COMMAND [flags]}
shift
python=${PYTHON:-python3}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

started=()
trap 'again=1; kill -TERM "${started[@]}" 2>/dev/null || true' TERM INT # each saves where it is, and ends
for ((index = 0; index < count; index++)); do
    if [ -e /dev/nvidia0 ]; then
        export CUDA_VISIBLE_DEVICES=$index
    fi
    JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$index JAX_COORDINATOR_ADDRESS=127.0.0.1:$port \
        "$python" -m jaxpeft "$@" &
    started+=($!)
done

status=0
for process in "${started[@]}"; do
    again=1
    while [ "$again" ]; do # a signal ends a wait, not the process
        again='' own=0
        wait "$process" || own=$?
    done
    [ "$own" = 0 ] || status=$own
done
exit "$status"
