#!/bin/sh
# Two roles on one machine: a provider splits a model and serves it from two workers; a data owner, who has only
# bundle/client, trains; one worker is killed on the way; the adapter is used with the original model in the end.
#   sh examples/remote.sh [MODEL [FOLDER [CONFIG]]]
# MODEL is a folder or hub name, or the built-in smollm2 (about 3 minutes on two cores). PORT and the next one are used,
# 5555 if not set.
set -eu
model=${1:-smollm2}
folder=${2:-demo-output/remote}
config=${3:-$(dirname "$0")/remote.toml}
mkdir -p "$folder"
rm -rf "$folder/bundle" "$folder/keys" "$folder/out"

echo "== The provider: split the model, make keys, start two workers with the same layers"
ciphertune split "$model" "$folder/bundle"
ciphertune keys "$folder/keys"
serve() {
  ciphertune worker "$folder/bundle/worker" --bind "tcp://127.0.0.1:$1" --curve "$folder/keys" >"$folder/worker-$1.txt" 2>"$folder/worker-$1.log" &
}
one=${PORT:-5555}
two=$((one + 1))
serve "$one"
first=$!
serve "$two"
second=$!
trap 'kill "$first" "$second" 2>/dev/null || true' EXIT INT TERM
for port in "$one" "$two"; do
  until grep -q '^ready ' "$folder/worker-$port.txt"; do
    sleep 0.2
    kill -0 "$first" "$second"
  done
done

echo "== The data owner: train from the client's part alone"
cp "$config" "$folder/train.toml"
ciphertune train "$folder/train.toml" \
  --to "mlwe+zmq://127.0.0.1:$one,127.0.0.1:$two?curve=$folder/keys" &
training=$!
until [ -d "$folder/out/checkpoints" ] && [ -n "$(ls "$folder/out/checkpoints")" ]; do
  sleep 0.2
  kill -0 "$training"
done

echo "== One worker is killed; its replica goes on"
kill -9 "$first"
wait "$training"

echo "== The adapter on the original, unsplit model"
python "$(dirname "$0")/held_out.py" "$model" "$folder/train.toml"
