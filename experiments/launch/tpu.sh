#!/usr/bin/env bash
# jaxpeft on a TPU slice, as a queued resource of Google Cloud; what is behind the script's name are flags of `train`:
#
#     NAME=tune ZONE=us-east5-a TYPE=v5p-64 OUT=/mnt/shared/run experiments/launch/tpu.sh \
#         --model /mnt/shared/llama --data /mnt/shared/rows.jsonl --mesh fsdp=32
#
# OUT, the model and the data lie where all hosts see them: a Filestore share, or a bucket mounted with gcsfuse
# (MOUNT, a command that mounts it, runs on each host first). The slice stays until it is deleted:
#
#     gcloud compute tpus queued-resources delete $NAME --zone $ZONE --force
set -euo pipefail

name=${NAME:?the name of the queued resource, and of its node}
zone=${ZONE:?the zone, such as us-east5-a}
type=${TYPE:?the accelerator type, such as v5p-64}
out=${OUT:?a folder that all hosts see}
runtime=${RUNTIME:-v2-alpha-tpuv5}
package=${PACKAGE:-"jaxpeft[tpu]"}

if ! gcloud compute tpus queued-resources describe "$name" --zone "$zone" >/dev/null 2>&1; then
    gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" \
        --accelerator-type "$type" --runtime-version "$runtime"
fi
state=
until [ "$state" = ACTIVE ]; do
    state=$(gcloud compute tpus queued-resources describe "$name" --zone "$zone" --format 'value(state.state)')
    case $state in
        FAILED | SUSPENDED)
            echo "tpu.sh: $name is $state" >&2
            exit 1
            ;;
        ACTIVE) ;;
        *) sleep "${PATIENCE:-30}" ;;
    esac
done

flags=$(printf ' %q' "$@")
out=$(printf '%q' "$out")
everywhere() {
    gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}
everywhere "${MOUNT:-true} && python3 -m pip install --quiet $package"
# The same command on each host; --processes auto: JAX asks the slice's metadata which of them it is on.
everywhere "python3 -m jaxpeft train --processes auto --out $out$flags \$(test -f $out/config.json && echo --resume)"
