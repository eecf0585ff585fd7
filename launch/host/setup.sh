#!/bin/bash
# Makes a fresh host ready: the bucket as a folder, Python with our packages. Doing it twice is harmless.
#
#   setup.sh BUCKET EXTRA     EXTRA: "tpu" or "cuda"; BUCKET "-": no bucket
set -euo pipefail
bucket=$1 extra=$2
code=$(cd "$(dirname "$0")/../.." && pwd)
home=$HOME/densevit

mount_bucket() {
  if ! command -v gcsfuse >/dev/null; then
    # Fresh machines update themselves and hold apt's lock meanwhile: wait for it.
    local key=/usr/share/keyrings/cloud.google.asc apt=(sudo apt-get -y -o DPkg::Lock::Timeout=600)
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    "${apt[@]}" update
    "${apt[@]}" install gcsfuse python3-pip
  fi
  mkdir -p "$HOME/bucket"
  # No metadata cache: every host must see at once what another has written.
  mountpoint -q "$HOME/bucket" ||
    gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" "$HOME/bucket"
  # A checkpoint gets its name by renaming its folder, which only buckets with hierarchical namespace can do in one go.
  local probe
  probe=$HOME/bucket/.probe-$(hostname)-$$
  mkdir -p "$probe" && touch "$probe/file"
  if ! mv -T "$probe" "$probe.renamed"; then
    rm -rf "$probe"
    echo "Folders in gs://$bucket cannot be renamed: create a bucket with --enable-hierarchical-namespace." >&2
    exit 1
  fi
  rm -rf "$probe.renamed"
}

[[ $bucket == - ]] || mount_bucket
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.11 "$home/venv"
python3 -m uv pip install --quiet --python "$home/venv/bin/python" \
  --constraint "$code/launch/host/constraints.txt" "${code}[$extra]"
"$home/venv/bin/python" -c 'import importlib.metadata as m, socket
print(f"{socket.gethostname()}: jax {m.version("jax")}, jaxlib {m.version("jaxlib")}")' || exit 1
